custom_imports = dict(imports=['mmcnv2'])

# The mean over the picture, LayerNorm, and a linear layer that starts close to zero.
model = dict(
    # Or MMEngine would look in our scope where this is inherited by mmcnv2::.
    _scope_='mmpretrain',
    type='ImageClassifier',
    backbone=dict(
        type='mmcnv2.ConvNeXtV2',
        arch='tiny',
        out_indices=(3,),
        gap_before_final_norm=True,
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=768,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=2e-5, bias=0.0),
    ),
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)],
    ),
)
