_base_ = './fcmae_convnextv2-pico_800e_imagenet.py'

train_cfg = dict(max_epochs=1600)
