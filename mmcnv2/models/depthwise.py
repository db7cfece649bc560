"""Depthwise convolution of pictures that are given as tiles, by kernels of our own."""

import torch
from torch import Tensor, nn

from . import kernels
from .shortcuts import dtype_of, is_plain
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
    return fits and kernels.fit_dtype(x, dtype_of(x))


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


def convolve_tiles(conv: nn.Conv2d, x: Tensor, tiles: Tiles | None) -> Tensor:
    """Convolve each channel with its neighbourhood, 7 x 7, at the positions of ``x``.

    Args:
        conv (nn.Conv2d): The convolution.
        x (Tensor): Features, ``(N, ..., C)``.
        tiles (Tiles, optional): How their positions lie in pictures. Whole pictures
            ``(N, H, W, C)`` need none.

    Returns:
        Tensor: Features of the same shape, in the dtype of ``x``, or in autocast's.
    """
    return _ConvolveTiles.apply(x.to(dtype_of(x)), conv.weight, conv.bias, tiles, False)


class _ConvolveTiles(torch.autograd.Function):
    """The convolution, or the way back through it, by the kernel turned by half."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tiles: Tiles | None,
        turned: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tiles, ctx.turned = tiles, turned
        return kernels.convolve(x, weight.flatten(1).t(), bias, tiles, turned)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), tiles, turned = ctx.saved_tensors, ctx.tiles, ctx.turned
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if of_x:
            grad_x = _ConvolveTiles.apply(grad, weight, None, tiles, not turned)
        if of_weight or of_bias:
            sums = _SumGradients.apply(x, grad, tiles, turned, weight.dtype)
            grad_weight, grad_bias = sums
        return grad_x, grad_weight, grad_bias if of_bias else None, None, None


class _SumGradients(torch.autograd.Function):
    """Gradients of weight and bias, which are linear in features and their gradients.

    The way back is by such convolutions again, so there are derivatives of any order.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        grad: Tensor,
        tiles: Tiles | None,
        turned: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, grad)
        ctx.tiles, ctx.turned = tiles, turned
        taps, bias = kernels.sum_gradients(x, grad, tiles)
        taps = taps.flip(0) if turned else taps
        return taps.t().reshape(-1, 1, 7, 7).to(dtype), bias.to(dtype)

    @staticmethod
    def backward(ctx, weight: Tensor, bias: Tensor) -> tuple[Tensor | None, ...]:
        (x, grad), tiles, turned = ctx.saved_tensors, ctx.tiles, ctx.turned
        of_x = _ConvolveTiles.apply(grad, weight, None, tiles, not turned)
        of_grad = _ConvolveTiles.apply(x, weight, bias, tiles, turned)
        return of_x, of_grad, None, None, None
