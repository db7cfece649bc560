"""Kernels for CPUs as operators of PyTorch, which its compiler calls as they are.

It is free to lay out in memory what it gives them.
"""

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


def _take_apart(tiles: Tiles | None) -> tuple[list[Tensor], list[int]]:
    if tiles is None:
        return [], []
    tables = tiles.near, tiles.origin, tiles.extent
    return [each for each in tables if each is not None], [tiles.side, tiles.row]


def _put_together(tables: list[Tensor], sizes: list[int]) -> Tiles | None:
    if not tables:
        return None
    (near, origin, *extent), (side, row) = tables, sizes
    return Tiles(side, near, origin, row, *extent)


@torch.library.custom_op(
    'mmcnv2::convolve',
    mutates_args=(),
    schema='(Tensor x, Tensor taps, Tensor? bias, Tensor[] tables, SymInt[] sizes, '
    'bool turned) -> Tensor',
)
def _convolve(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    tables: list[Tensor],
    sizes: list[int],
    turned: bool,
) -> Tensor:
    tiles = _put_together(tables, sizes)
    return cpu.convolve(x.contiguous(), taps, bias, tiles, turned)


@_convolve.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    'mmcnv2::sum_gradients',
    mutates_args=(),
    schema='(Tensor x, Tensor grad, Tensor[] tables, SymInt[] sizes) -> Tensor',
)
def _sum_gradients(
    x: Tensor, grad: Tensor, tables: list[Tensor], sizes: list[int]
) -> Tensor:
    tiles = _put_together(tables, sizes)
    return cpu.sum_gradients(x.contiguous(), grad.contiguous(), tiles)


@_sum_gradients.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(cpu.SUMS, x.shape[-1], dtype=torch.float32)
