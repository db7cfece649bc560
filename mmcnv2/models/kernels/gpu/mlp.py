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
# Of a program on expanded features: positions and channels of a step, and at most how
# many steps, so that a small picture is one program's.
_ROWS, _WIDE, _MOST_STEPS = 8, 64, 10
_PARTS = 8  # sums of a picture that a program of GRN adds up itself
# For which no kernels of their own are compiled: pictures come in many sizes.
_SIZES = ['positions', 'steps']


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
    x: Tensor, grad: Tensor, weight: Tensor, statistics: Tensor, others: Tensor
) -> tuple[Tensor, Tensor]:
    """Go back; the second are the gradients of weight and bias, and sums of others.

    Those lie as ``x`` does. Of all three the sums are ``(3, C)``.
    """
    out = torch.empty_like(x)
    channels = x.shape[-1]
    count = x.numel() // channels
    rows, wide = _shape_of_lines(channels)
    parts = cover(count, rows * _STEPS)
    sums = x.new_empty(parts, 3, channels, dtype=torch.float32)
    _layer_norm_backward[(parts,)](
        *(x, grad, weight, statistics, others, out, sums, count, channels),
        rows=rows,
        wide=wide,
        steps=_STEPS,
    )
    return out, sums.sum(0)


def gelu_squares(x: Tensor, bias: Tensor) -> Tensor:
    """Sum the squares of GELU over a few parts of each picture: ``(N, parts, C)``."""
    grid, how = _grid(x)
    sums = _new_sums(x, grid)
    _gelu_squares[grid](x, bias, sums, *x.shape[1:], **how)
    return _in_few_parts(sums)


def gelu_products(x: Tensor, bias: Tensor, grad: Tensor) -> Tensor:
    """Sum the products of GELU and a gradient in the same way."""
    grid, how = _grid(x)
    sums = _new_sums(x, grid)
    _gelu_products[grid](x, bias, grad, sums, *x.shape[1:], **how)
    return _in_few_parts(sums)


def gelu_scaled(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute GELU, scaled by ``(N, C)`` and shifted by ``(C,)``."""
    out = torch.empty_like(x)
    grid, how = _grid(x)
    _gelu_scaled[grid](x, bias, scale, shift, out, *x.shape[1:], **how)
    return out


def gelu_backward(
    x: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor,
    of_scale: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """Go back, as gelu.cpp does: ``grad`` becomes that of ``x``.

    Returns what :func:`gelu_scaled` does, and ``(3, C)``: the gradients of the bias and
    of the shift, and the sums of ``of_scale`` over pictures.
    """
    out = torch.empty_like(x)
    grid, how = _grid(x)
    sums = _new_sums(x, grid, 3)
    tensors = x, bias, scale, shift, slope, of_scale, grad, out, sums
    _gelu_backward[grid](*tensors, *x.shape[1:], **how)
    return out, sums.sum((1, 2))


def grn_scale(squares: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return norms and what GRN multiplies by, both ``(N, C)``."""
    pictures, parts, channels = squares.shape
    norm, scale = squares.new_empty(2, pictures, channels)
    wide = triton.next_power_of_2(channels)
    tensors = squares, gamma, norm, scale
    _grn_scale[(pictures,)](*tensors, parts, channels, eps, wide=wide)
    return norm, scale


def grn_slope(
    products: Tensor, gamma: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Go from the gradient of what GRN multiplies by to those of gamma and norm.

    The first is of each picture; the second is divided by the norm. Both ``(N, C)``.
    """
    pictures, parts, channels = products.shape
    of_gamma, slope = torch.empty_like(norm), torch.empty_like(norm)
    wide = triton.next_power_of_2(channels)
    tensors = products, gamma, norm, of_gamma, slope
    _grn_slope[(pictures,)](*tensors, parts, channels, eps, wide=wide)
    return of_gamma, slope


def _shape_of_lines(channels: int) -> tuple[int, int]:
    wide = triton.next_power_of_2(channels)
    return max(_ELEMENTS // wide, 1), wide


def _grid(x: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return the programs on expanded features, and how each of them goes."""
    pictures, positions, channels = x.shape
    parts = cover(positions, _ROWS * _MOST_STEPS)
    steps = cover(cover(positions, parts), _ROWS)
    # The second and third may be 65,535 at most.
    grid = parts, cover(channels, _WIDE), pictures
    return grid, dict(steps=steps, rows=_ROWS, wide=_WIDE)


def _new_sums(x: Tensor, grid: tuple[int, int, int], *kinds: int) -> Tensor:
    return x.new_empty(*kinds, len(x), grid[0], x.shape[-1], dtype=torch.float32)


def _in_few_parts(sums: Tensor) -> Tensor:
    return sums if sums.shape[1] <= _PARTS else sums.sum(1, keepdim=True)


@triton.jit(do_not_specialize=['count'])
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


@triton.jit(do_not_specialize=['count'])
def _layer_norm_backward(
    x,
    grad,
    weight,
    statistics,
    others,
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
    of_others = tl.zeros((rows, wide), tl.float32)
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
        of_others += tl.load(others + place, inside, 0).to(tl.float32)
        slope *= scale
        along = tl.sum(slope * value, 1)[:, None] / channels
        slope = (slope - tl.sum(slope, 1)[:, None] / channels - value * along) * inverse
        tl.store(out + place, slope, inside)
    first = sums + tl.program_id(0) * 3 * channels + channel
    tl.store(first, tl.sum(of_weight, 0), some)
    tl.store(first + channels, tl.sum(of_bias, 0), some)
    tl.store(first + 2 * channels, tl.sum(of_others, 0), some)


@triton.jit
def _place(step, steps, positions, channels, rows: tl.constexpr, wide: tl.constexpr):
    """Return where a step of a program finds its elements, and which are there."""
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    row = (tl.program_id(0) * steps + step) * rows + tl.arange(0, rows)
    position = tl.program_id(2).to(tl.int64) * positions + row
    inside = (row < positions)[:, None] & (channel < channels)
    return position[:, None] * channels + channel, inside


@triton.jit
def _store_sums(sums, number, total, channels, wide: tl.constexpr):
    """Store a program's sums into one of several tensors of such sums."""
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    picture = number * tl.num_programs(2) + tl.program_id(2)
    part = picture.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + part * channels + channel, tl.sum(total, 0), channel < channels)


@triton.jit
def _load_line(line, channels, wide: tl.constexpr):
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    return tl.load(line + channel, channel < channels, 0).to(tl.float32)


@triton.jit
def _load_line_of_picture(lines, channels, wide: tl.constexpr):
    return _load_line(lines + tl.program_id(2) * channels, channels, wide)


@triton.jit
def _normal(x):
    """Return how much of the normal distribution lies below x, and its density there.

    The former is right up to an error of 1e-7: 26.2.17 in Abramowitz and Stegun's
    Handbook of Mathematical Functions, half the work of an error function.
    """
    # exp(-x * x / 2) / sqrt(2 * pi), by the powers of 2 that GPUs have.
    density = tl.exp2(-0.7213475204444817 * x * x - 1.3257480647361593)
    t = 1 + 0.2316419 * tl.abs(x)
    # Its inverse, in a quarter of a division's instructions.
    t = tl.rsqrt(t * t)
    sum = 1.781477937 + t * (-1.821255978 + t * 1.330274429)
    beyond = density * t * (0.319381530 + t * (-0.356563782 + t * sum))
    return tl.where(x > 0, 1 - beyond, beyond), density


@triton.jit
def _gelu(x):
    below, _ = _normal(x)
    return x * below


@triton.jit(do_not_specialize=_SIZES)
def _gelu_squares(
    x,
    bias,
    sums,
    positions,
    channels,
    steps,
    rows: tl.constexpr,
    wide: tl.constexpr,
):
    before = _load_line(bias, channels, wide)
    total = tl.zeros((rows, wide), tl.float32)
    for step in range(steps):
        place, inside = _place(step, steps, positions, channels, rows, wide)
        value = tl.load(x + place, inside, 0).to(tl.float32) + before
        active = tl.where(inside, _gelu(value), 0)
        total += active * active
    _store_sums(sums, 0, total, channels, wide)


@triton.jit(do_not_specialize=_SIZES)
def _gelu_products(
    x,
    bias,
    grad,
    sums,
    positions,
    channels,
    steps,
    rows: tl.constexpr,
    wide: tl.constexpr,
):
    before = _load_line(bias, channels, wide)
    total = tl.zeros((rows, wide), tl.float32)
    for step in range(steps):
        place, inside = _place(step, steps, positions, channels, rows, wide)
        value = tl.load(x + place, inside, 0).to(tl.float32) + before
        slope = tl.load(grad + place, inside, 0).to(tl.float32)
        total += _gelu(value) * slope
    _store_sums(sums, 0, total, channels, wide)


@triton.jit(do_not_specialize=_SIZES)
def _gelu_scaled(
    x,
    bias,
    scale,
    shift,
    out,
    positions,
    channels,
    steps,
    rows: tl.constexpr,
    wide: tl.constexpr,
):
    before = _load_line(bias, channels, wide)
    factor = _load_line_of_picture(scale, channels, wide)
    offset = _load_line(shift, channels, wide)
    for step in range(steps):
        place, inside = _place(step, steps, positions, channels, rows, wide)
        value = tl.load(x + place, inside, 0).to(tl.float32) + before
        tl.store(out + place, _gelu(value) * factor + offset, inside)


@triton.jit(do_not_specialize=_SIZES)
def _gelu_backward(
    x,
    bias,
    scale,
    shift,
    slope,
    of_scale,
    grad,
    out,
    sums,
    positions,
    channels,
    steps,
    rows: tl.constexpr,
    wide: tl.constexpr,
):
    before = _load_line(bias, channels, wide)
    factor = _load_line_of_picture(scale, channels, wide)
    lean = _load_line_of_picture(slope, channels, wide)
    offset = _load_line(shift, channels, wide)
    of_bias = tl.zeros((rows, wide), tl.float32)
    of_shift = tl.zeros((rows, wide), tl.float32)
    for step in range(steps):
        place, inside = _place(step, steps, positions, channels, rows, wide)
        value = tl.load(x + place, inside, 0).to(tl.float32) + before
        after = tl.load(grad + place, inside, 0).to(tl.float32)
        below, density = _normal(value)
        active = value * below
        slant = (after * factor + active * lean) * (below + value * density)
        tl.store(grad + place, slant, inside)
        tl.store(out + place, active * factor + offset, inside)
        of_bias += tl.where(inside, slant, 0)
        of_shift += after
    _store_sums(sums, 0, of_bias, channels, wide)
    _store_sums(sums, 1, of_shift, channels, wide)
    # Those of a picture count once, not in each of its parts.
    line = _load_line_of_picture(of_scale, channels, wide)[None, :]
    _store_sums(sums, 2, tl.where(tl.program_id(0) == 0, line, 0), channels, wide)


@triton.jit
def _add_parts(sums, parts, channels, wide: tl.constexpr):
    """Sum over the parts of a program's picture."""
    channel = tl.arange(0, wide)
    total = tl.zeros((wide,), tl.float32)
    for part in range(parts):
        line = sums + (tl.program_id(0) * parts + part) * channels
        total += tl.load(line + channel, channel < channels, 0)
    return total


@triton.jit(do_not_specialize=['parts'])
def _grn_scale(squares, gamma, norm, scale, parts, channels, eps, wide: tl.constexpr):
    channel = tl.arange(0, wide)
    some = channel < channels
    own = tl.program_id(0) * channels + channel
    length = tl.sqrt(_add_parts(squares, parts, channels, wide))
    mean = tl.sum(length, 0) / channels + eps
    weight = tl.load(gamma + channel, some, 0).to(tl.float32)
    tl.store(norm + own, length, some)
    tl.store(scale + own, weight * (length / mean) + 1, some)


@triton.jit(do_not_specialize=['parts'])
def _grn_slope(
    products,
    gamma,
    norm,
    of_gamma,
    slope,
    parts,
    channels,
    eps,
    wide: tl.constexpr,
):
    channel = tl.arange(0, wide)
    some = channel < channels
    own = tl.program_id(0) * channels + channel
    length = tl.load(norm + own, some, 0)
    mean = tl.sum(length, 0) / channels + eps
    of_scale = _add_parts(products, parts, channels, wide)
    weight = tl.load(gamma + channel, some, 0).to(tl.float32)
    relative = of_scale * (length / mean)
    through_mean = tl.sum(relative * weight, 0) / channels
    of_norm = (of_scale * weight - through_mean) / mean
    present = length > 0
    tl.store(of_gamma + own, relative, some)
    lean = tl.where(present, of_norm / tl.where(present, length, 1), 0)
    tl.store(slope + own, lean, some)
