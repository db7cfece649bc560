_base_ = '../fcmae_convnextv2-atto_demo.py'

train_cfg = dict(val_interval=10)
default_hooks = dict(checkpoint=dict(interval=10))
