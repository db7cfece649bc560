_base_ = './mask-rcnn_convnextv2-tiny_fpn_ms-crop-1x_coco.py'

checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-nano_3rdparty-fcmae_in1k_20230104-3dd1f29e.pth'

model = dict(
    backbone=dict(
        arch='nano',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint=checkpoint_file),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
