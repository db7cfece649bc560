_base_ = [
    '../_base_/models/fcmae_convnextv2-tiny.py',
    '../_base_/datasets/imagenet_unlabelled.py',
    '../_base_/schedules/fcmae_800e.py',
    '../_base_/fcmae_runtime.py',
]
