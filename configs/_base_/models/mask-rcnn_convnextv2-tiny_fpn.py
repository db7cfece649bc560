_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

custom_imports = dict(imports=['mmcnv2'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmcnv2.ConvNeXtV2',
        arch='tiny',
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
