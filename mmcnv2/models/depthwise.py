"""Depthwise convolution of pictures that are given as tiles, by kernels for CPUs."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import kernels
from .shortcuts import is_observed
from .tiles import Tiles


def is_quicker_by_tiles(conv: nn.Conv2d, x: Tensor) -> bool:
    """Tell whether :func:`convolve_tiles` can take the place of a block's convolution.

    Args:
        conv (nn.Conv2d): The convolution.
        x (Tensor): Features, ``(N, ..., C)``.

    Returns:
        bool: Whether there is a kernel for it, and nobody would miss its call.
    """
    # Others may have been put in its place.
    ours = type(conv) is nn.Conv2d and conv.kernel_size == (7, 7)
    known = torch.float32, torch.bfloat16
    fits = kernels.fit(x, *known) and _dtype_of(x) in known
    return fits and ours and conv.bias is not None and not is_observed(conv)


def convolve_tiles(conv: nn.Conv2d, x: Tensor, tiles: Tiles) -> Tensor:
    """Convolve each channel with its neighbourhood, 7 x 7, at the positions of ``x``.

    Args:
        conv (nn.Conv2d): The convolution.
        x (Tensor): Features, ``(N, ..., C)``.
        tiles (Tiles): How their positions lie in pictures.

    Returns:
        Tensor: Features of the same shape.
    """
    return _ConvolveTiles.apply(*autocast(x, conv), tiles)


def autocast(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast what a convolution computes with, as autocast does for PyTorch's own.

    Args:
        x (Tensor): Its input.
        conv (nn.Conv2d): The convolution.

    Returns:
        tuple[Tensor, Tensor, Tensor | None]: Input, weight and bias in one dtype:
        autocast's if it is on, or else that of the input.
    """
    dtype = _dtype_of(x)
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return x.to(dtype), conv.weight.to(dtype), bias


def _dtype_of(x: Tensor) -> torch.dtype:
    device = x.device.type
    autocasts = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocasts else x.dtype


class _ConvolveTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, tiles: Tiles) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tiles = tiles
        return kernels.convolve(x, _taps(weight), bias.float(), tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), tiles = ctx.saved_tensors, ctx.tiles
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if of_x:
            # It is such a convolution too, with the kernel turned.
            grad_x = kernels.convolve(grad, _taps(weight).flip(0), None, tiles)
        if of_weight or of_bias:
            taps, grad_bias = kernels.sum_gradients(x, grad, tiles)
            grad_weight = taps.t().reshape(weight.shape).to(weight.dtype)
            grad_bias = grad_bias.to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def _taps(weight: Tensor) -> Tensor:
    """Return the kernel ``(C, 1, 7, 7)`` as ``(49, C)``."""
    return weight.flatten(1).t().float()
