init_cfg = dict(type='mmcnv2.FCMAEInit')
model = dict(
    type='FCMAE',
    data_preprocessor=dict(
        type='FCMAEDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        type='ConvNeXtV2',
        arch='tiny',
        init_cfg=init_cfg,
    ),
    neck=dict(
        type='FCMAEDecoder',
        decoder_dim=512,
        decoder_depth=1,
        init_cfg=init_cfg,
    ),
    head=dict(type='FCMAEHead', norm_pix=True),
    mask_ratio=0.6,
)
