# A third of the demo.
_base_ = '../mask-rcnn_convnextv2-atto_fpn_demo.py'

train_cfg = dict(max_epochs=4, val_interval=4)
default_hooks = dict(checkpoint=dict(interval=4, save_optimizer=False))
