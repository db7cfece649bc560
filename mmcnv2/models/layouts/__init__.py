"""Where a pixel's neighbours are: all in which the ways to run the encoder differ.

All of a network but its convolutions works on single positions of channels-last
tensors ``(N, ..., C)``. The convolutions go through a layout, which knows how those
positions lie in the picture.
"""

from typing import Protocol

from torch import Tensor, nn

from .dense import DenseLayout
from .minkowski import MinkowskiLayout, import_minkowski_engine
from .packed import PackedLayout, find_visible

__all__ = [
    'DenseLayout',
    'Layout',
    'MinkowskiLayout',
    'PackedLayout',
    'find_visible',
    'import_minkowski_engine',
]


class Layout(Protocol):
    """What the encoder asks of a layout; ``...`` stands for the layout's positions."""

    def stem(self, conv: nn.Conv2d, image: Tensor) -> Tensor:
        """Cut pictures ``(N, C, H, W)`` into cells side by side: ``(N, ..., C1)``."""

    def depthwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Convolve each channel with its neighbourhood, at the positions of ``x``."""

    def downsample(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Merge each 2 x 2 positions into one."""

    def output(self, x: Tensor) -> Tensor:
        """Hand features to whoever called the encoder."""
