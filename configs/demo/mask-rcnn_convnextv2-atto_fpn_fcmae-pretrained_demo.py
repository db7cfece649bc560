_base_ = './mask-rcnn_convnextv2-atto_fpn_demo.py'

checkpoint = 'work_dirs/fcmae_convnextv2-atto_demo/epoch_10.pth'

model = dict(
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
)
