_base_ = './mask-rcnn_convnextv2-tiny_fpn_ms-crop-1x_coco.py'

checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-pico_3rdparty-fcmae_in1k_20230104-147b1b59.pth'

model = dict(
    backbone=dict(
        arch='pico',
        drop_path_rate=0.0,
        init_cfg=dict(checkpoint=checkpoint_file),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
