_base_ = [
    '../_base_/models/fcmae_convnextv2-tiny.py',
    '../_base_/datasets/demo_unlabelled.py',
    '../_base_/schedules/fcmae_800e.py',
    '../_base_/fcmae_runtime.py',
]

# Weights start with a standard deviation of 0.02. From the paper's, of 1, a run of some
# hundred steps learns next to nothing.
model = dict(
    backbone=dict(arch='atto', init_cfg=None),
    neck=dict(decoder_dim=256, init_cfg=None),
)

train_cfg = dict(max_epochs=10, val_interval=5)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=60),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True),
]
optim_wrapper = dict(
    accumulative_counts=1,
    optimizer=dict(lr=1e-3),
)
auto_scale_lr = dict(base_batch_size=32)

default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=5, max_keep_ckpts=1),
)
