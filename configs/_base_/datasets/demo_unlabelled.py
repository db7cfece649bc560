# The embedded scenes without labels; they are made on first use.
_base_ = './imagenet_unlabelled.py'

scenes = dict(
    type='DemoScenes',
    dataset_type='UnlabelledImages',
    data_root='data/demo_scenes/',
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=160, crop_ratio_range=(0.2, 1.0)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackPretrainInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='PackPretrainInputs'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    dataset=dict(
        **scenes,
        data_prefix=dict(img_path='images/unlabelled/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=1,
    dataset=dict(
        **scenes,
        data_prefix=dict(img_path='images/val/'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
