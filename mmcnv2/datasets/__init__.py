"""Data sets of mmcnv2."""

from .demo_scenes import DemoScenes

__all__ = ['DemoScenes']
