"""Kernels for CPUs, in C++, which setup.py compiles where there is a compiler.

They are plain functions of a shared library and take tensors by the address of their
data, so that they fit any version of PyTorch.
"""

import warnings
from collections.abc import Sequence
from ctypes import CDLL, Structure, byref, c_double, c_int, c_int64, c_void_p
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tiles import Tiles

LANES = 8  # channels that are computed at a time
SUMS = 50  # for each channel: gradients of a kernel of 7 x 7, and of its bias

_INTERFACE = 6  # of kernels.h
_GROUP = 2048  # positions whose gradients of a depthwise kernel are


def _load(path: Path) -> CDLL | None:
    if not path.exists():
        return None
    try:
        library = CDLL(str(path))
        if library.mmcnv2_interface() == _INTERFACE:
            return library
        problem = 'they are of another version of mmcnv2'
    except (OSError, AttributeError) as error:
        problem = str(error)
    warnings.warn(
        f'the kernels of mmcnv2 in {path} are not used, and CPUs are slower without: '
        f'{problem}. Install mmcnv2 anew, which compiles them: '
        'pip install --no-build-isolation -e .',
        stacklevel=2,
    )
    return None


_LIBRARY = _load(Path(__file__).with_name(f'_compiled{EXTENSION_SUFFIXES[0]}'))


class _Tiles(Structure):
    """``Tiles`` of depthwise.cpp."""

    _fields_ = (
        ('side', c_int64),
        ('near', c_void_p),
        ('origin', c_void_p),
        ('extent', c_void_p),
        ('count', c_int64),
        ('row', c_int64),
        ('channels', c_int64),
        ('group', c_int64),
    )


class _Matrix(Structure):
    """``Matrix`` of kernels.h."""

    _fields_ = (('at', c_void_p), ('row', c_int64), ('column', c_int64))


class _Layers(Structure):
    """``Layers`` of kernels.h."""

    _fields_ = (
        *(('channels', c_int64), ('wide', c_int64), ('eps', c_double)),
        *((name, c_void_p) for name in ('weight1', 'bias1', 'gamma', 'beta')),
        *(('weight2', c_void_p), ('bias2', c_void_p)),
    )


class _Gradients(Structure):
    """``Gradients`` of kernels.h."""

    _fields_ = tuple(
        (name, c_void_p) for name in ('weight1', 'bias1', 'gamma', 'beta', 'weight2')
    )


def is_loaded() -> bool:
    """Tell whether there are any."""
    return _LIBRARY is not None


def convolve(
    x: Tensor, taps: Tensor, bias: Tensor | None, tiles: Tiles | None, turned: bool
) -> Tensor:
    taps = (taps.flip(0) if turned else taps).float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    tiles, out = tiles or _cut(*x.shape[:3]), torch.empty_like(x)
    _run('convolve', x.dtype, byref(_describe(tiles, x)), x, taps, bias, out)
    return out


def sum_gradients(x: Tensor, grad: Tensor, tiles: Tiles | None) -> Tensor:
    tiles = tiles or _cut(*x.shape[:3])
    described = _describe(tiles, x)
    groups = -(-described.count // described.group)
    sums = x.new_zeros(groups, SUMS, x.shape[-1], dtype=torch.float32)
    _run('sum_gradients', x.dtype, byref(described), x, grad, sums)
    return sums.sum(0)


@lru_cache(maxsize=32)
def _cut(count: int, height: int, width: int) -> Tiles:
    """Cut pictures into tiles, which are few to keep, for all blocks of a stage."""
    return Tiles.of_pictures(count, height, width)


def _describe(tiles: Tiles, x: Tensor) -> _Tiles:
    return _Tiles(
        tiles.side,
        tiles.near.data_ptr(),
        tiles.origin.data_ptr(),
        None if tiles.extent is None else tiles.extent.data_ptr(),
        len(tiles.near),
        tiles.row,
        x.shape[-1],
        max(_GROUP // tiles.side**2, 1),
    )


def sum_gelu(name: str, x: Tensor, *tensors: Tensor, sums: int = 1) -> Tensor:
    """Call a function of gelu.cpp, which returns so many sums for each channel."""
    out = x.new_empty(len(x), sums, x.shape[-1], dtype=torch.float32)
    _run(name, x.dtype, *x.shape, x, *tensors, out)
    return out


def multiply(left: Tensor, right: Tensor, out: Tensor, start: Tensor | None) -> None:
    """Write ``left @ right + start`` to ``out``, which is contiguous."""
    depth, columns = right.shape
    line = 0 if start is None or start.dim() == 1 else start.stride(0)
    left_at, right_at = (_Matrix(x.data_ptr(), *x.stride()) for x in (left, right))
    sizes = len(left), columns, depth
    _run('multiply', out.dtype, left_at, right_at, start, line, out, *sizes)


def expand_and_project(
    layers: Sequence[Tensor], eps: float, x: Tensor, places: Sequence[Tensor]
) -> None:
    described = byref(_describe_layers(layers, eps))
    _run('expand_and_project', x.dtype, described, *x.shape[:2], x, *places)


def expand_and_project_backward(
    layers: Sequence[Tensor],
    eps: float,
    x: Tensor,
    places: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    has_weights: bool,
) -> None:
    described = byref(_describe_layers(layers, eps))
    sums = byref(_Gradients(*map(_convert, grads)))
    arguments = *x.shape[:2], x, *places, sums, has_weights
    _run('expand_and_project_backward', x.dtype, described, *arguments)


def _describe_layers(layers: Sequence[Tensor], eps: float) -> _Layers:
    wide, channels = layers[0].shape
    return _Layers(channels, wide, eps, *map(_convert, layers))


def _run(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call a function of the library for a dtype."""
    function = getattr(_LIBRARY, f'{name}_{str(dtype).removeprefix("torch.")}')
    function(*map(_convert, arguments), c_int(torch.get_num_threads()))


def _convert(argument: Any) -> Any:
    """Take tensors by the address of their data."""
    if isinstance(argument, Tensor):
        return c_void_p(argument.data_ptr())
    return c_int64(argument) if isinstance(argument, int) else argument
