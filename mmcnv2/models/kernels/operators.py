"""Kernels for CPUs as operators of PyTorch, which its compiler calls as they are."""

import torch
from torch import Tensor

from ..tiles import Tiles
from . import cpu


def convolve(
    x: Tensor, taps: Tensor, bias: Tensor | None, tiles: Tiles | None, turned: bool
) -> Tensor:
    return _convolve(x, taps, bias, *_take_apart(tiles), turned)


def sum_gradients(x: Tensor, grad: Tensor, tiles: Tiles | None) -> Tensor:
    return _sum_gradients(x, grad, *_take_apart(tiles))


def _take_apart(tiles: Tiles | None) -> tuple[Tensor | None, Tensor | None, int]:
    return (None, None, 0) if tiles is None else (tiles.near, tiles.origin, tiles.side)


def _put_together(
    near: Tensor | None, origin: Tensor | None, side: int
) -> Tiles | None:
    """Return tiles whose rows lie one after the other: those of visible patches."""
    if near is None or origin is None:
        return None
    return Tiles(side, near, origin, row=side)


@torch.library.custom_op('mmcnv2::convolve', mutates_args=(), device_types='cpu')
def _convolve(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    near: Tensor | None,
    origin: Tensor | None,
    side: int,
    turned: bool,
) -> Tensor:
    return cpu.convolve(x, taps, bias, _put_together(near, origin, side), turned)


@_convolve.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op('mmcnv2::sum_gradients', mutates_args=(), device_types='cpu')
def _sum_gradients(
    x: Tensor, grad: Tensor, near: Tensor | None, origin: Tensor | None, side: int
) -> Tensor:
    return cpu.sum_gradients(x, grad, _put_together(near, origin, side))


@_sum_gradients.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(cpu.SUMS, x.shape[-1], dtype=torch.float32)
