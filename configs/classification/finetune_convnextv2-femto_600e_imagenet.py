_base_ = './finetune_convnextv2-pico_600e_imagenet.py'

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-femto_3rdparty-fcmae_in1k_20230104-adbe2082.pth'

model = dict(
    backbone=dict(arch='femto', init_cfg=dict(checkpoint=checkpoint)),
    head=dict(in_channels=384),
)

optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
