_base_ = './finetune_convnextv2-tiny_300e_imagenet.py'

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-base_3rdparty-fcmae_in1k_20230104-8a798eaf.pth'

model = dict(
    backbone=dict(
        arch='base', drop_path_rate=0.1, init_cfg=dict(checkpoint=checkpoint)
    ),
    head=dict(in_channels=1024),
)

train_cfg = dict(max_epochs=100)
optim_wrapper = dict(
    paramwise_cfg=dict(decay_rate=0.6, decay_type='layer_wise'),
    optimizer=dict(lr=2.5e-3),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-4,
        by_epoch=True,
        begin=0,
        end=20,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-6 / 2.5e-3,
        by_epoch=True,
        begin=20,
        convert_to_iter_based=True,
    ),
]
