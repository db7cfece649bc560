"""Depthwise convolution of visible patches, or of whole pictures, and its gradients.

A program computes all rows of some tiles, a few channels of them. For each column of
the kernel it reads every row of positions once, and adds it to all rows of the output,
or of the kernel's gradient, that it belongs to.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tiles import Tiles
from . import cover, on_device_of

_PICTURE_SIDE = 8  # of the tiles that whole pictures are cut into
_COLUMNS = 8  # of tiles, side by side, in a program
_CHANNELS = 32
_WARPS = 1
_STEPS = 8  # of a program that sums gradients
# For which no kernel of its own is compiled: pictures come in many.
_SIZES = ['count', 'height', 'width', 'down', 'across']


def convolve(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    tiles: Tiles | None,
    turned: bool,
) -> Tensor:
    taps = taps.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty_like(x)
    channels = x.shape[-1]
    count, near, sizes, kind = _describe(x, tiles)
    grid = cover(count, kind['tiles']), cover(channels, _CHANNELS)
    tensors = x, taps, bias, out, near
    how = dict(kind, turned=turned, num_warps=_WARPS)
    with on_device_of(x):
        _convolve[grid](*tensors, count, channels, *sizes, **how)
    return out


def sum_gradients(x: Tensor, grad: Tensor, tiles: Tiles | None) -> Tensor:
    channels = x.shape[-1]
    count, near, sizes, kind = _describe(x, tiles)
    parts = cover(count, kind['tiles'] * _STEPS)
    sums = x.new_empty(parts, 50, channels, dtype=torch.float32)
    grid = parts, cover(channels, _CHANNELS), 7
    how = dict(kind, steps=_STEPS, num_warps=_WARPS)
    with on_device_of(x):
        _sum_gradients[grid](x, grad, sums, near, count, channels, *sizes, **how)
    return sums.sum(0)


def _describe(x: Tensor, tiles: Tiles | None) -> tuple:
    """Return the number of tiles, their neighbours, sizes of pictures, and kind."""
    if tiles is None:
        pictures, height, width, _ = x.shape
        down, across = cover(height, _PICTURE_SIDE), cover(width, _PICTURE_SIDE)
        sizes = height, width, down, across
        kind = dict(whole=True, side=_PICTURE_SIDE)
        count, near = pictures * down * across, None
    else:
        count, near, sizes = len(tiles.near), tiles.near, (0, 0, 0, 0)
        kind = dict(whole=False, side=tiles.side)
    kind |= dict(tiles=_COLUMNS // kind['side'], wide=_CHANNELS)
    return count, near, sizes, kind


@triton.jit(do_not_specialize=_SIZES)
def _convolve(
    x,
    taps,
    bias,
    out,
    near,
    count,
    channels,
    height,
    width,
    down,
    across,
    whole: tl.constexpr,
    side: tl.constexpr,
    tiles: tl.constexpr,
    wide: tl.constexpr,
    turned: tl.constexpr,
):
    tile, column, channel = _place(tl.program_id(0), side, tiles, wide)
    # For every position, so that no thread waits for another to hand it over.
    line = tl.zeros((tiles * side, 1), tl.int32) + channel
    some = line < channels
    total = tl.zeros((tiles * side, wide), tl.float32)
    if bias is not None:
        total += tl.load(bias + line, some, 0).to(tl.float32)
    totals = (total,) * side
    sizes = (count, channels, height, width, down, across)
    for j in range(7):
        rows = _find_rows(tile, column + j - 3, near, sizes, whole, side)
        kernel = ()
        for i in tl.static_range(7):
            tap = 48 - (i * 7 + j) if turned else i * 7 + j
            kernel += (tl.load(taps + tap * channels + line, some, 0).to(tl.float32),)
        for r in tl.static_range(side + 6):
            value = _load_row(x, rows, r - 3, channel, sizes, whole, side)
            new = ()
            for o in tl.static_range(side):
                if r - o >= 0 and r - o < 7:
                    new += (totals[o] + value * kernel[r - o],)
                else:
                    new += (totals[o],)
            totals = new
    rows = _find_rows(tile, column, near, sizes, whole, side)
    for o in tl.static_range(side):
        place, there = _locate_row(rows, o, channel, sizes, whole, side)
        tl.store(out + place, totals[o], there)


@triton.jit(do_not_specialize=_SIZES)
def _sum_gradients(
    x,
    grad,
    sums,
    near,
    count,
    channels,
    height,
    width,
    down,
    across,
    whole: tl.constexpr,
    side: tl.constexpr,
    tiles: tl.constexpr,
    wide: tl.constexpr,
    steps: tl.constexpr,
):
    part, j = tl.program_id(0), tl.program_id(2)
    sizes = (count, channels, height, width, down, across)
    total = tl.zeros((tiles * side, wide), tl.float32)
    totals = (total,) * 7
    for step in range(steps):
        tile, column, channel = _place(part * steps + step, side, tiles, wide)
        rows = _find_rows(tile, column, near, sizes, whole, side)
        slopes = ()
        for o in tl.static_range(side):
            slopes += (_load_row(grad, rows, o, channel, sizes, whole, side),)
            total += slopes[o]
        rows = _find_rows(tile, column + j - 3, near, sizes, whole, side)
        for r in tl.static_range(side + 6):
            value = _load_row(x, rows, r - 3, channel, sizes, whole, side)
            new = ()
            for i in tl.static_range(7):
                if r - i >= 0 and r - i < side:
                    new += (totals[i] + value * slopes[r - i],)
                else:
                    new += (totals[i],)
            totals = new
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    first = sums + (part * 50 + j) * channels + channel
    for i in tl.static_range(7):
        tl.store(first + i * 7 * channels, tl.sum(totals[i], 0), channel < channels)
    if j == 0:
        tl.store(first + 49 * channels, tl.sum(total, 0), channel < channels)


@triton.jit
def _place(number, side: tl.constexpr, tiles: tl.constexpr, wide: tl.constexpr):
    """Return the tiles and columns, side by side, of a program, and its channels."""
    beside = tl.arange(0, tiles * side)
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    return number * tiles + beside // side, beside % side, channel


@triton.jit
def _find_rows(tile, column, near, sizes, whole: tl.constexpr, side: tl.constexpr):
    """Tell where columns, seen from tiles, begin, and whether anything is there.

    Of whole pictures that is their first row, and the last number is that of the tile's
    own first row. Of patches it is that of each of the tiles above, beside and below.
    """
    count, _, height, width, down, across = sizes
    if whole:
        column += tile % across * side
        there = (tile < count) & (column >= 0) & (column < width)
        first = (tile // (down * across)).to(tl.int64) * height * width + column
        firsts, theres, top = (first,), (there,), tile // across % down * side
    else:
        reach: tl.constexpr = (3 + side - 1) // side
        around: tl.constexpr = 2 * reach + 1
        column += reach * side
        firsts, theres, top = (), (), tile
        for up in tl.static_range(around):
            place = near + (tile * around + up) * around + column // side
            other = tl.load(place, tile < count, -1)
            firsts += (other.to(tl.int64) * side * side + column % side,)
            theres += (other >= 0,)
    return firsts, theres, top


@triton.jit
def _locate_row(
    rows,
    row: tl.constexpr,
    channel,
    sizes,
    whole: tl.constexpr,
    side: tl.constexpr,
):
    """Return where a row of tiles, or one above or below, lies, and if it is there."""
    firsts, theres, top = rows
    _, channels, height, width, _, _ = sizes
    if whole:
        position = firsts[0] + (top + row) * width
        there = theres[0] & (top + row >= 0) & (top + row < height)
    else:
        reach: tl.constexpr = (3 + side - 1) // side
        position = firsts[(row + reach * side) // side]
        position += (row + reach * side) % side * side
        there = theres[(row + reach * side) // side]
    place = position[:, None] * channels + channel
    return place, there[:, None] & (channel < channels)


@triton.jit
def _load_row(
    x,
    rows,
    row: tl.constexpr,
    channel,
    sizes,
    whole: tl.constexpr,
    side: tl.constexpr,
):
    place, there = _locate_row(rows, row, channel, sizes, whole, side)
    return tl.load(x + place, there, 0).to(tl.float32)
