_base_ = './finetune_convnextv2-tiny_300e_imagenet.py'

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-huge_3rdparty-fcmae_in1k_20230104-fe43ae6c.pth'

model = dict(
    backbone=dict(
        arch='huge', drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint)
    ),
    head=dict(in_channels=2816),
)

train_cfg = dict(max_epochs=50)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.75), optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-4,
        by_epoch=True,
        begin=0,
        end=10,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-6 / 5e-4,
        by_epoch=True,
        begin=10,
        convert_to_iter_based=True,
    ),
]
