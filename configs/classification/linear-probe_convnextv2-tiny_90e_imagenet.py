_base_ = [
    '../_base_/models/classifier_convnextv2-tiny.py',
    'mmpretrain::_base_/datasets/imagenet_bs32_pil_bicubic.py',
    '../_base_/schedules/linear-probe_90e.py',
    'mmpretrain::_base_/default_runtime.py',
]

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-tiny_3rdparty-fcmae_in1k_20230104-80513adc.pth'

# FCMAE has no last norm. As MAE does, features are normalised over the batch instead.
model = dict(
    backbone=dict(
        frozen_stages=4,
        output_norm=False,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
    neck=dict(type='ClsBatchNormNeck', input_features=768),
    head=dict(
        loss=dict(_delete_=True, type='CrossEntropyLoss'),
        init_cfg=dict(std=0.01),
    ),
    train_cfg=None,
)

train_dataloader = dict(batch_size=2048, drop_last=True)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
randomness = dict(seed=0, diff_rank_seed=True)
