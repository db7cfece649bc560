_base_ = './finetune_convnextv2-base_100e_imagenet.py'

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-large_3rdparty-fcmae_in1k_20230104-bf38df92.pth'

model = dict(
    backbone=dict(
        arch='large', drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint)
    ),
    head=dict(in_channels=1536),
)
