# 160k iterations at a batch of 16, such as 8 GPUs with 2 pictures each.
_base_ = 'mmseg::_base_/schedules/schedule_160k.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(
        type='PolyLR',
        power=1.0,
        begin=1500,
        eta_min=0.0,
        by_epoch=False,
    ),
]

optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    constructor='mmcnv2.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=0.9, decay_type='stage_wise'),
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)

auto_scale_lr = dict(enable=False, base_batch_size=16)
