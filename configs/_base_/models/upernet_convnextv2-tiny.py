_base_ = 'mmseg::_base_/models/upernet_convnext.py'

custom_imports = dict(imports=['mmcnv2'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmcnv2.ConvNeXtV2',
        arch='tiny',
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
