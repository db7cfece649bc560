_base_ = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'

custom_imports = dict(imports=['mmcnv2'])

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-tiny_3rdparty-fcmae_in1k_20230104-80513adc.pth'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmcnv2.ConvNeXtV2',
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)

# The base spares what has 'norm' in its name; this spares all norms, and GRN.
optim_wrapper = dict(
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys=dict(grn=dict(decay_mult=0.0)),
    ),
)

auto_scale_lr = dict(enable=False, base_batch_size=16)
