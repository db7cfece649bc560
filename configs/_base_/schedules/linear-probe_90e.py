# 90 epochs at a batch of 16384, such as 8 GPUs with 2048 pictures each: MAE's linear
# probing, as mmpretrain has it.
train_cfg = dict(by_epoch=True, max_epochs=90, val_interval=1)
val_cfg = dict()
test_cfg = dict()

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
        by_epoch=True,
        begin=10,
        convert_to_iter_based=True,
    ),
]

# 0.1 for each 256 pictures.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(type='mmpretrain.LARS', lr=6.4, momentum=0.9, weight_decay=0.0),
)

auto_scale_lr = dict(enable=False, base_batch_size=16384)
