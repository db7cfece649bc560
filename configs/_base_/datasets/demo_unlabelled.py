# The embedded scenes without labels; they are made on first use.
data_root = 'data/demo_scenes/'

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
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='DemoScenes',
        dataset_type='UnlabelledImages',
        data_root=data_root,
        data_prefix=dict(img_path='images/unlabelled/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='DemoScenes',
        dataset_type='UnlabelledImages',
        data_root=data_root,
        data_prefix=dict(img_path='images/val/'),
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='ReconstructionMetric')
test_evaluator = val_evaluator
