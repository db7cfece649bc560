_base_ = [
    '../_base_/models/mask-rcnn_convnextv2-tiny_fpn.py',
    '../_base_/datasets/coco_instance_lsj.py',
    '../_base_/schedules/adamw_3x.py',
    'mmdet::_base_/default_runtime.py',
]

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-tiny_3rdparty-fcmae_in1k_20230104-80513adc.pth'

model = dict(
    backbone=dict(
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
    test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms'))),
)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='coco/segm_mAP'))
