_base_ = './cascade-mask-rcnn_convnextv2-tiny_fpn_ms-crop-3x_coco.py'

checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-huge_3rdparty-fcmae_in1k_20230104-fe43ae6c.pth'

model = dict(
    backbone=dict(
        arch='huge',
        drop_path_rate=0.5,
        with_cp=True,
        init_cfg=dict(checkpoint=checkpoint_file),
    ),
    neck=dict(in_channels=[352, 704, 1408, 2816]),
)
