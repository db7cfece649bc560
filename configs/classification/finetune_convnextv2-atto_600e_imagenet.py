_base_ = './finetune_convnextv2-pico_600e_imagenet.py'

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-atto_3rdparty-fcmae_in1k_20230104-07514db4.pth'

model = dict(
    backbone=dict(
        arch='atto', drop_path_rate=0.1, init_cfg=dict(checkpoint=checkpoint)
    ),
    head=dict(in_channels=320),
    train_cfg=None,
)
