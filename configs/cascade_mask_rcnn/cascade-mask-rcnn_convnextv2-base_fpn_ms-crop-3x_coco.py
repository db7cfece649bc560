_base_ = './cascade-mask-rcnn_convnextv2-tiny_fpn_ms-crop-3x_coco.py'

checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-base_3rdparty-fcmae_in1k_20230104-8a798eaf.pth'

model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(checkpoint=checkpoint_file),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
