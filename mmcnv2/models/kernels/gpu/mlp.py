"""What a block does between its products: LayerNorm, GELU and GRN.

Features are contiguous, ``(N, P, C)``, and on the current GPU. Sums over positions are
in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cover

_ELEMENTS = 4096  # of a program of LayerNorm
_STEPS = 4  # of one that sums its gradients
# For which no kernel of its own is compiled: pictures come in many.
_SIZES = ['count', 'positions']
# Of a program that sums over the positions of a picture.
_SUMMED = dict(rows=8, wide=128, steps=8)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normalise; also return mean and reciprocal deviation of each position."""
    out = torch.empty_like(x, dtype=dtype)
    channels = x.shape[-1]
    count = x.numel() // channels
    statistics = x.new_empty(2, count, dtype=torch.float32)
    rows, wide = _shape_of_lines(channels)
    _layer_norm[(cover(count, rows),)](
        *(x, weight, bias, out, statistics, count, channels, eps),
        rows=rows,
        wide=wide,
    )
    return out, statistics


def layer_norm_backward(
    x: Tensor, grad: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """Go back; the second is the gradient of weight and bias, ``(2, C)``."""
    out = torch.empty_like(x)
    channels = x.shape[-1]
    count = x.numel() // channels
    rows, wide = _shape_of_lines(channels)
    parts = cover(count, rows * _STEPS)
    sums = x.new_empty(parts, 2, channels, dtype=torch.float32)
    _layer_norm_backward[(parts,)](
        *(x, grad, weight, statistics, out, sums, count, channels),
        rows=rows,
        wide=wide,
        steps=_STEPS,
    )
    return out, sums.sum(0)


def gelu_squares(x: Tensor) -> Tensor:
    """Sum the squares of GELU: ``(N, C)``."""
    return _sum_pictures(_gelu_squares, x)


def gelu_products(x: Tensor, grad: Tensor) -> Tensor:
    """Sum the products of GELU and a gradient: ``(N, C)``."""
    return _sum_pictures(_gelu_products, x, grad)


def gelu_scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute GELU, scaled by ``(N, C)`` and shifted by ``(C,)``."""
    out = torch.empty_like(x)
    _gelu_scaled[_grid(x)](x, scale, shift, out, *x.shape[1:], **_SUMMED)
    return out


def gelu_backward(
    x: Tensor, scale: Tensor, shift: Tensor, slope: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Go back, as gelu.cpp does: ``grad`` becomes that of ``x``."""
    out = torch.empty_like(x)
    return out, _sum_pictures(_gelu_backward, x, scale, shift, slope, grad, out)


def grn_scale(squares: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return norms and what GRN multiplies by, both ``(N, C)``."""
    norm, scale = torch.empty_like(squares), torch.empty_like(squares)
    pictures, channels = squares.shape
    wide = triton.next_power_of_2(channels)
    _grn_scale[(pictures,)](squares, gamma, norm, scale, channels, eps, wide=wide)
    return norm, scale


def grn_slope(
    grad: Tensor, gamma: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Go from the gradient of what GRN multiplies by to those of gamma and norm.

    The first is of each picture; the second is divided by the norm. Both ``(N, C)``.
    """
    of_gamma, slope = torch.empty_like(norm), torch.empty_like(norm)
    pictures, channels = norm.shape
    wide = triton.next_power_of_2(channels)
    _grn_slope[(pictures,)](
        *(grad, gamma, norm, of_gamma, slope, channels, eps), wide=wide
    )
    return of_gamma, slope


def _shape_of_lines(channels: int) -> tuple[int, int]:
    wide = triton.next_power_of_2(channels)
    return max(_ELEMENTS // wide, 1), wide


def _grid(x: Tensor) -> tuple[int, int, int]:
    pictures, positions, channels = x.shape
    high = _SUMMED['rows'] * _SUMMED['steps']
    # The others may be 65,535 at most.
    return cover(positions, high), cover(channels, _SUMMED['wide']), pictures


def _sum_pictures(kernel, x: Tensor, *tensors: Tensor) -> Tensor:
    """Run a kernel that sums over the positions of each picture."""
    grid = _grid(x)
    sums = x.new_empty(len(x), grid[0], x.shape[-1], dtype=torch.float32)
    kernel[grid](x, *tensors, sums, *x.shape[1:], **_SUMMED)
    return sums[:, 0] if grid[0] == 1 else sums.sum(1)


@triton.jit(do_not_specialize=_SIZES)
def _layer_norm(
    x,
    weight,
    bias,
    out,
    statistics,
    count,
    channels,
    eps,
    rows: tl.constexpr,
    wide: tl.constexpr,
):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.arange(0, wide)
    some = channel < channels
    inside = (row < count)[:, None] & some
    place = row.to(tl.int64)[:, None] * channels + channel
    value = tl.load(x + place, inside, 0).to(tl.float32)
    mean = tl.sum(value, 1) / channels
    value = tl.where(some, value - mean[:, None], 0)
    inverse = 1 / tl.sqrt(tl.sum(value * value, 1) / channels + eps)
    scale = tl.load(weight + channel, some, 0).to(tl.float32)
    shift = tl.load(bias + channel, some, 0).to(tl.float32)
    tl.store(out + place, value * inverse[:, None] * scale + shift, inside)
    tl.store(statistics + row, mean, row < count)
    tl.store(statistics + count + row, inverse, row < count)


@triton.jit(do_not_specialize=_SIZES)
def _layer_norm_backward(
    x,
    grad,
    weight,
    statistics,
    out,
    sums,
    count,
    channels,
    rows: tl.constexpr,
    wide: tl.constexpr,
    steps: tl.constexpr,
):
    channel = tl.arange(0, wide)
    some = channel < channels
    scale = tl.load(weight + channel, some, 0).to(tl.float32)
    of_weight = tl.zeros((rows, wide), tl.float32)
    of_bias = tl.zeros((rows, wide), tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * rows + tl.arange(0, rows)
        inside = (row < count)[:, None] & some
        place = row.to(tl.int64)[:, None] * channels + channel
        mean = tl.load(statistics + row, row < count, 0)
        inverse = tl.load(statistics + count + row, row < count, 0)[:, None]
        value = tl.load(x + place, inside, 0).to(tl.float32) - mean[:, None]
        value = tl.where(some, value * inverse, 0)
        slope = tl.load(grad + place, inside, 0).to(tl.float32)
        of_weight += slope * value
        of_bias += slope
        slope *= scale
        along = tl.sum(slope * value, 1)[:, None] / channels
        slope = (slope - tl.sum(slope, 1)[:, None] / channels - value * along) * inverse
        tl.store(out + place, slope, inside)
    first = sums + tl.program_id(0) * 2 * channels + channel
    tl.store(first, tl.sum(of_weight, 0), some)
    tl.store(first + channels, tl.sum(of_bias, 0), some)


@triton.jit
def _place(step, positions, channels, rows: tl.constexpr, wide: tl.constexpr, steps):
    """Return where a step of a program finds its elements, and which are there."""
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    row = (tl.program_id(0) * steps + step) * rows + tl.arange(0, rows)
    position = tl.program_id(2).to(tl.int64) * positions + row
    inside = (row < positions)[:, None] & (channel < channels)
    return position[:, None] * channels + channel, inside


@triton.jit
def _store_sums(sums, total, channels, wide: tl.constexpr):
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    part = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + part * channels + channel, tl.sum(total, 0), channel < channels)


@triton.jit
def _load_line(line, channels, wide: tl.constexpr):
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    return tl.load(line + channel, channel < channels, 0).to(tl.float32)


@triton.jit
def _normal(x):
    """Return how much of the normal distribution lies below x, and its density there.

    The former is right up to an error of 1e-7: 26.2.17 in Abramowitz and Stegun's
    Handbook of Mathematical Functions, half the work of an error function.
    """
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    t = 1 / (1 + 0.2316419 * tl.abs(x))
    sum = 1.781477937 + t * (-1.821255978 + t * 1.330274429)
    beyond = density * t * (0.319381530 + t * (-0.356563782 + t * sum))
    return tl.where(x > 0, 1 - beyond, beyond), density


@triton.jit(do_not_specialize=_SIZES)
def _gelu_squares(
    x,
    sums,
    positions,
    channels,
    rows: tl.constexpr,
    wide: tl.constexpr,
    steps: tl.constexpr,
):
    total = tl.zeros((rows, wide), tl.float32)
    for step in range(steps):
        place, inside = _place(step, positions, channels, rows, wide, steps)
        value = tl.load(x + place, inside, 0).to(tl.float32)
        below, _ = _normal(value)
        total += value * below * value * below
    _store_sums(sums, total, channels, wide)


@triton.jit(do_not_specialize=_SIZES)
def _gelu_products(
    x,
    grad,
    sums,
    positions,
    channels,
    rows: tl.constexpr,
    wide: tl.constexpr,
    steps: tl.constexpr,
):
    total = tl.zeros((rows, wide), tl.float32)
    for step in range(steps):
        place, inside = _place(step, positions, channels, rows, wide, steps)
        value = tl.load(x + place, inside, 0).to(tl.float32)
        slope = tl.load(grad + place, inside, 0).to(tl.float32)
        below, _ = _normal(value)
        total += value * below * slope
    _store_sums(sums, total, channels, wide)


@triton.jit(do_not_specialize=_SIZES)
def _gelu_scaled(
    x,
    scale,
    shift,
    out,
    positions,
    channels,
    rows: tl.constexpr,
    wide: tl.constexpr,
    steps: tl.constexpr,
):
    factor = _load_line(scale + tl.program_id(2) * channels, channels, wide)
    offset = _load_line(shift, channels, wide)
    for step in range(steps):
        place, inside = _place(step, positions, channels, rows, wide, steps)
        value = tl.load(x + place, inside, 0).to(tl.float32)
        below, _ = _normal(value)
        tl.store(out + place, value * below * factor + offset, inside)


@triton.jit(do_not_specialize=_SIZES)
def _gelu_backward(
    x,
    scale,
    shift,
    slope,
    grad,
    out,
    sums,
    positions,
    channels,
    rows: tl.constexpr,
    wide: tl.constexpr,
    steps: tl.constexpr,
):
    factor = _load_line(scale + tl.program_id(2) * channels, channels, wide)
    lean = _load_line(slope + tl.program_id(2) * channels, channels, wide)
    offset = _load_line(shift, channels, wide)
    total = tl.zeros((rows, wide), tl.float32)
    for step in range(steps):
        place, inside = _place(step, positions, channels, rows, wide, steps)
        value = tl.load(x + place, inside, 0).to(tl.float32)
        after = tl.load(grad + place, inside, 0).to(tl.float32)
        below, density = _normal(value)
        active = value * below
        before = (after * factor + active * lean) * (below + value * density)
        tl.store(grad + place, before, inside)
        tl.store(out + place, active * factor + offset, inside)
        total += before
    _store_sums(sums, total, channels, wide)


@triton.jit
def _grn_scale(squares, gamma, norm, scale, channels, eps, wide: tl.constexpr):
    channel = tl.arange(0, wide)
    some = channel < channels
    own = tl.program_id(0) * channels + channel
    length = tl.sqrt(tl.load(squares + own, some, 0))
    mean = tl.sum(length, 0) / channels + eps
    weight = tl.load(gamma + channel, some, 0).to(tl.float32)
    tl.store(norm + own, length, some)
    tl.store(scale + own, weight * (length / mean) + 1, some)


@triton.jit
def _grn_slope(grad, gamma, norm, of_gamma, slope, channels, eps, wide: tl.constexpr):
    channel = tl.arange(0, wide)
    some = channel < channels
    own = tl.program_id(0) * channels + channel
    length = tl.load(norm + own, some, 0)
    mean = tl.sum(length, 0) / channels + eps
    of_scale = tl.load(grad + own, some, 0)
    weight = tl.load(gamma + channel, some, 0).to(tl.float32)
    relative = of_scale * (length / mean)
    through_mean = tl.sum(relative * weight, 0) / channels
    of_norm = (of_scale * weight - through_mean) / mean
    present = length > 0
    tl.store(of_gamma + own, relative, some)
    lean = tl.where(present, of_norm / tl.where(present, length, 1), 0)
    tl.store(slope + own, lean, some)
