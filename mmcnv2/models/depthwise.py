"""Depthwise convolution of pictures that are given as tiles, by kernels for CPUs."""

import torch
from torch import Tensor, nn

from . import kernels
from .shortcuts import autocast, dtype_of, is_plain
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
    return fits and dtype_of(x) in (torch.float32, torch.bfloat16)


def is_depthwise(conv: nn.Module, channels: int) -> bool:
    """Tell whether a block's convolution is as it was built.

    Args:
        conv (nn.Module): What stands in its place.
        channels (int): Those of the features.

    Returns:
        bool: Whether nothing else is, nobody has changed it, and nobody would miss its
        call.
    """
    if not is_plain(conv, nn.Conv2d) or conv.bias is None:
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
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tiles = tiles
        taps = weight.flatten(1).t().float()
        return kernels.convolve(x, taps, None if bias is None else bias.float(), tiles)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), tiles = ctx.saved_tensors, ctx.tiles
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if of_x:
            grad_x = _convolve_turned(grad, weight, tiles)
        if of_weight or of_bias:
            grad_weight, grad_bias = _SumGradients.apply(x, grad, tiles)
        return grad_x, grad_weight, grad_bias if of_bias else None, None


class _SumGradients(torch.autograd.Function):
    """Gradients of weight and bias, which are linear in features and their gradients.

    The way back is by such convolutions again, so there are derivatives of any order.
    """

    @staticmethod
    def forward(ctx, x: Tensor, grad: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, grad)
        ctx.tiles = tiles
        taps, bias = kernels.sum_gradients(x, grad, tiles)
        return taps.t().reshape(-1, 1, 7, 7).to(x.dtype), bias.to(x.dtype)

    @staticmethod
    def backward(ctx, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, grad), tiles = ctx.saved_tensors, ctx.tiles
        of_x = _convolve_turned(grad, weight, tiles)
        return of_x, _ConvolveTiles.apply(x, weight, bias, tiles), None


def _convolve_turned(grad: Tensor, weight: Tensor, tiles: Tiles) -> Tensor:
    """Go back to what was convolved: a convolution with the kernel turned."""
    return _ConvolveTiles.apply(grad, weight.flip(2, 3), None, tiles)
