_base_ = './finetune_convnextv2-pico_600e_imagenet.py'

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-nano_3rdparty-fcmae_in1k_20230104-3dd1f29e.pth'

model = dict(
    backbone=dict(
        arch='nano', drop_path_rate=0.1, init_cfg=dict(checkpoint=checkpoint)
    ),
    head=dict(in_channels=640),
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.5), dict(type='CutMix', alpha=0.5)],
    ),
)
