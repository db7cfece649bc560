_base_ = [
    '../_base_/models/upernet_convnextv2-tiny.py',
    '../_base_/datasets/demo_semantic.py',
    '../_base_/schedules/adamw_160k.py',
    'mmseg::_base_/default_runtime.py',
]

norm_cfg = dict(type='BN')
# Four fifths of the pixels are background, which from scratch would be the whole answer
# for long.
class_weight = [0.2, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
model = dict(
    data_preprocessor=dict(size=(192, 192)),
    backbone=dict(arch='atto'),
    decode_head=dict(
        in_channels=[40, 80, 160, 320],
        channels=64,
        num_classes=7,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(
        in_channels=160,
        channels=64,
        num_classes=7,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
)

train_cfg = dict(max_iters=800, val_interval=400)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(lr=2e-3),
    paramwise_cfg=dict(decay_rate=1.0),
)
auto_scale_lr = dict(base_batch_size=8)

default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=400, max_keep_ckpts=1),
)
