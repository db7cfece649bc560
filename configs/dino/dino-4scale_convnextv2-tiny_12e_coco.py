_base_ = [
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    '../_base_/schedules/spared_norms.py',
]

custom_imports = dict(imports=['mmcnv2'])

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-tiny_3rdparty-fcmae_in1k_20230104-80513adc.pth'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmcnv2.ConvNeXtV2',
        arch='tiny',
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)

# The decoder's own norm is called as those of blocks are.
spared = {**_base_.spared_norms, 'decoder.norm.': dict(lr_mult=1.0)}
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=spared))
