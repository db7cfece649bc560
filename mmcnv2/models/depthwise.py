"""Depthwise convolution of pictures that are given as tiles, by kernels for CPUs."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import kernels
from .shortcuts import autocast, dtype_of, is_observed
from .tiles import Tiles


def is_quicker_by_tiles(conv: nn.Conv2d, x: Tensor) -> bool:
    """Tell whether :func:`convolve_tiles` can take the place of a block's convolution.

    Args:
        conv (nn.Conv2d): The convolution.
        x (Tensor): Features, ``(N, ..., C)``.

    Returns:
        bool: Whether there is a kernel for it, and nobody would miss its call.
    """
    fits = kernels.fit(x, *conv.parameters()) and is_depthwise(conv, x.shape[-1])
    known = torch.float32, torch.bfloat16
    return fits and dtype_of(x) in known and not is_observed(conv)


def is_depthwise(conv: nn.Module, channels: int) -> bool:
    """Tell whether a block's convolution is as it was built.

    Args:
        conv (nn.Module): What stands in its place.
        channels (int): Those of the features.

    Returns:
        bool: Whether nothing else is, and nobody has changed it.
    """
    if type(conv) is not nn.Conv2d or 'forward' in vars(conv) or conv.bias is None:
        return False
    geometry = conv.stride, conv.padding, conv.dilation, conv.padding_mode
    shapes = conv.weight.shape, conv.bias.shape, conv.groups
    return geometry == ((1, 1), (3, 3), (1, 1), 'zeros') and shapes == (
        (channels, 1, 7, 7),
        (channels,),
        channels,
    )


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
