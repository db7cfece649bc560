_base_ = './fcmae_convnextv2-tiny_800e_imagenet.py'

model = dict(backbone=dict(arch='nano'))
