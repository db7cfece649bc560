"""Kernels of our own: for CPUs in C++, for GPUs in Triton.

Where there are none, or they do not fit a tensor, PyTorch's own operations compute the
same.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from ..shortcuts import is_exported, is_ordinary, is_traced
from ..tiles import Tiles
from . import cpu

# Triton 3.2, which belongs to PyTorch 2.6, cannot compile them.
_IS_NEW = bool(torch.version.cuda) and torch.__version__ >= '2.7'
HAS_TRITON = _IS_NEW and find_spec('triton') is not None
if HAS_TRITON:
    from .gpu import depthwise as gpu

# Of Ampere; they have run on nothing older.
_CAPABILITY = 8


def are_compiled() -> bool:
    """Tell whether there are any for CPUs.

    Returns:
        bool: Whether setup.py could compile them here, and they load.
    """
    return cpu.is_loaded()


def fit(x: Tensor, *others: Tensor) -> bool:
    """Tell whether kernels compute on tensors.

    Args:
        x (Tensor): Features, ``(..., C)``.
        *others (Tensor): Weights.

    Returns:
        bool: Whether all tensors are ordinary memory of a device for which there are
        kernels: a CPU, where they take channels in multiples of 8, or the current GPU.
        While a model is compiled those for CPUs do not fit, and while it is exported
        none does.
    """
    tensors = x, *others
    if not all(each.device == x.device and is_ordinary(each) for each in tensors):
        return False
    if x.is_cpu:
        return cpu.is_loaded() and not is_traced() and x.shape[-1] % cpu.LANES == 0
    if not (HAS_TRITON and x.is_cuda) or is_exported():
        return False
    if torch.cuda.get_device_properties(x.device).major < _CAPABILITY:
        return False
    # Triton starts kernels on the current device, unless a compiler sees to it.
    return is_traced() or x.device.index == torch.cuda.current_device()


def fit_dtype(x: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether kernels take features in a dtype.

    Args:
        x (Tensor): Features.
        dtype (torch.dtype): What they are cast to.

    Returns:
        bool: Whether it is float32, bfloat16, or, on GPUs, float16.
    """
    if dtype in (torch.float32, torch.bfloat16):
        return True
    return dtype == torch.float16 and not x.is_cpu


def convolve(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    tiles: Tiles | None,
    turned: bool = False,
) -> Tensor:
    """Convolve each channel of tiles by itself with a kernel of 7 x 7.

    Args:
        x (Tensor): Features, ``(N, ..., C)``.
        taps (Tensor): The kernel, ``(49, C)``.
        bias (Tensor, optional): ``(C,)``.
        tiles (Tiles, optional): How the positions of ``x`` lie in pictures. On GPUs
            whole pictures ``(N, H, W, C)`` need none.
        turned (bool): Whether the kernel is turned by half, as it is on the way back.
            Defaults to False.

    Returns:
        Tensor: Of shape and dtype of ``x``.
    """
    if tiles is None or not x.is_cpu:
        return gpu.convolve(x.contiguous(), taps, bias, tiles, turned)
    return cpu.convolve(x.contiguous(), taps, bias, tiles, turned)


def sum_gradients(
    x: Tensor, grad: Tensor, tiles: Tiles | None
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of that kernel and its bias.

    Args:
        x (Tensor): Features, ``(N, ..., C)``.
        grad (Tensor): Gradient of the output, of the same shape and dtype.
        tiles (Tiles, optional): How their positions lie in pictures, as above.

    Returns:
        tuple[Tensor, Tensor]: Those of the kernel, ``(49, C)``, and of the bias,
        ``(C,)``, in float32.
    """
    x, grad = x.contiguous(), grad.contiguous()
    if tiles is None or not x.is_cpu:
        whole = gpu.sum_gradients(x, grad, tiles)
    else:
        whole = cpu.sum_gradients(x, grad, tiles)
    return whole[:-1], whole[-1]
