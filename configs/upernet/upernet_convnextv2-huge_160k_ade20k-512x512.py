_base_ = './upernet_convnextv2-tiny_160k_ade20k-512x512.py'

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-huge_fcmae-pre_3rdparty_in1k_20230104-f795e5b8.pth'

model = dict(
    backbone=dict(
        arch='huge',
        with_cp=True,
        init_cfg=dict(checkpoint=checkpoint),
    ),
    decode_head=dict(in_channels=[352, 704, 1408, 2816]),
    auxiliary_head=dict(in_channels=1408),
)
