_base_ = [
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    '../_base_/schedules/spared_norms.py',
]

custom_imports = dict(imports=['mmcnv2'])

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-tiny_3rdparty-fcmae_in1k_20230104-80513adc.pth'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmcnv2.ConvNeXtV2',
        arch='tiny',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
    panoptic_head=dict(in_channels=[96, 192, 384, 768]),
)

optim_wrapper = dict(paramwise_cfg=dict(custom_keys={{_base_.spared_norms}}))
