# 300 epochs at a batch of 1024: 8 GPUs with 32 pictures, 4 batches a step.
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# 40 epochs of warm-up, then a cosine to 1e-6 at the last epoch, for each layer in
# proportion to its own rate.
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-4,
        by_epoch=True,
        begin=0,
        end=40,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-6 / 3.2e-3,
        by_epoch=True,
        begin=40,
        convert_to_iter_based=True,
    ),
]

# 8e-4 for each 256 pictures of a step.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    accumulative_counts=4,
    constructor='mmcnv2.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=0.9, decay_type='block_wise'),
    optimizer=dict(type='AdamW', lr=3.2e-3, betas=(0.9, 0.999), weight_decay=0.05),
)

# Of one step: 4 batches on each of 8 GPUs.
auto_scale_lr = dict(enable=False, base_batch_size=1024)

# The weights' moving average, with a decay of 0.9999 a step, is what is validated.
custom_hooks = [
    dict(
        type='mmpretrain.EMAHook',
        momentum=1e-4,
        interval=4,
        priority='ABOVE_NORMAL',
    ),
]
