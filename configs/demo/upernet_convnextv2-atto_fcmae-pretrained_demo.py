_base_ = './upernet_convnextv2-atto_demo.py'

checkpoint = 'work_dirs/fcmae_convnextv2-atto_demo/epoch_10.pth'

model = dict(
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
)
