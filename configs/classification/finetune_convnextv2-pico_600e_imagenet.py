_base_ = './finetune_convnextv2-tiny_300e_imagenet.py'

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-pico_3rdparty-fcmae_in1k_20230104-147b1b59.pth'

model = dict(
    backbone=dict(
        arch='pico', drop_path_rate=0.0, init_cfg=dict(checkpoint=checkpoint)
    ),
    head=dict(in_channels=512, loss=dict(label_smooth_val=0.2)),
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.3), dict(type='CutMix', alpha=0.3)],
    ),
)

train_cfg = dict(max_epochs=600)
optim_wrapper = dict(optimizer=dict(lr=8e-4, weight_decay=0.3))
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-6 / 8e-4,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
