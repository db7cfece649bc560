_base_ = [
    '../_base_/models/classifier_convnextv2-tiny.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    '../_base_/schedules/finetune_300e.py',
    'mmpretrain::_base_/default_runtime.py',
]

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-tiny_3rdparty-fcmae_in1k_20230104-80513adc.pth'

model = dict(
    backbone=dict(
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
)

train_dataloader = dict(batch_size=32, drop_last=True)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
# Each process draws pictures to mix and blocks to drop of its own.
randomness = dict(seed=0, diff_rank_seed=True)
