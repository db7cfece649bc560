"""Data sets of mmcnv2."""

from .coco_check import check_coco
from .demo_scenes import DemoScenes
from .transforms import PackPretrainInputs, RandomResizedCrop
from .unlabelled import UnlabelledImages

__all__ = [
    'DemoScenes',
    'PackPretrainInputs',
    'RandomResizedCrop',
    'UnlabelledImages',
    'check_coco',
]
