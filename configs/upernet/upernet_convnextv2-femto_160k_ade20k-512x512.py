_base_ = './upernet_convnextv2-tiny_160k_ade20k-512x512.py'

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-femto_fcmae-pre_3rdparty_in1k_20230104-92a75d75.pth'

model = dict(
    backbone=dict(
        arch='femto',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint=checkpoint),
    ),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)
