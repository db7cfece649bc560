# 800 epochs at an effective batch of 4096: 8 GPUs with 64 pictures, 8 batches a step.
train_cfg = dict(by_epoch=True, max_epochs=800, val_interval=20)
val_cfg = dict()
test_cfg = dict()

# 40 epochs of warm-up, then a cosine to zero at the last epoch, however many.
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
        by_epoch=True,
        begin=40,
        convert_to_iter_based=True,
    ),
]

# 1.5e-4 for each 256 pictures of a step. A decay_rate of 1 keeps one learning rate; the
# constructor spares biases, norms and GRN from weight decay.
optim_wrapper = dict(
    type='OptimWrapper',
    accumulative_counts=8,
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=1.0),
    optimizer=dict(type='AdamW', lr=2.4e-3, betas=(0.9, 0.95), weight_decay=0.05),
)

# Of one step: 8 batches on each of 8 GPUs.
auto_scale_lr = dict(enable=False, base_batch_size=4096)
