"""Kernels for GPUs, in Triton, which comes with PyTorch where that is built for them.

They take any number of channels. Whatever is summed is so in float32, and always in the
same order.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ...shortcuts import is_traced


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Make a tensor's GPU the current one, on which Triton starts kernels.

    Compilers see to that themselves.
    """
    if is_traced() or not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def cover(length: int, size: int) -> int:
    """Return how many pieces of a size cover a length."""
    return -(-length // size)
