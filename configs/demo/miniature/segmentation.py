# A quarter of the demo.
_base_ = '../upernet_convnextv2-atto_demo.py'

train_cfg = dict(max_iters=200, val_interval=200)
default_hooks = dict(checkpoint=dict(interval=200, save_optimizer=False))
