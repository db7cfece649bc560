"""Kernels for CPUs, in C++, which setup.py compiles where there is a compiler.

They are plain functions of a shared library and take tensors by the address of their
data, so that they fit any version of PyTorch.
"""

import warnings
from collections.abc import Callable
from ctypes import CDLL, Structure, byref, c_int, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from ..tiles import Tiles

LANES = 8  # channels that are computed at a time

_INTERFACE = 5  # of lanes.h
_CHUNK = 64  # positions of a picture that are summed in one go
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
    """``Matrix`` of product.cpp."""

    _fields_ = (('at', c_void_p), ('row', c_int64), ('column', c_int64))


def is_loaded() -> bool:
    """Tell whether there are any."""
    return _LIBRARY is not None


def convolve(
    x: Tensor, taps: Tensor, bias: Tensor | None, tiles: Tiles | None, turned: bool
) -> Tensor:
    taps = (taps.flip(0) if turned else taps).float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    out = torch.empty_like(x)
    _run('convolve', _describe(tiles, x), x, taps, bias, out)
    return out


def sum_gradients(x: Tensor, grad: Tensor, tiles: Tiles | None) -> Tensor:
    described = _describe(tiles, x)
    groups = -(-described.count // described.group)
    sums = x.new_zeros(groups, 50, x.shape[-1], dtype=torch.float32)
    _run('sum_gradients', described, x, grad, sums)
    return sums.sum(0)


def _describe(tiles: Tiles | None, x: Tensor) -> _Tiles:
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


def _run(name: str, tiles: _Tiles, x: Tensor, *tensors: Tensor | None) -> None:
    """Call a function of depthwise.cpp for the dtype of ``x``."""
    threads = c_int(torch.get_num_threads())
    _kernel(name, x)(byref(tiles), *map(_address, (x, *tensors)), threads)


def _kernel(name: str, x: Tensor) -> Callable:
    dtype = str(x.dtype).removeprefix('torch.')
    return getattr(_LIBRARY, f'{name}_{dtype}')


def sum_gelu(name: str, x: Tensor, *tensors: Tensor | None) -> Tensor:
    chunks = -(-x.shape[1] // _CHUNK)
    sums = x.new_zeros(len(x), chunks, x.shape[-1], dtype=torch.float32)
    addresses = map(_address, (x, *tensors, sums))
    threads = c_int(torch.get_num_threads())
    sizes = map(c_int64, (*x.shape, _CHUNK))
    _kernel(name, x)(*sizes, *addresses, threads)
    return sums.sum(1, keepdim=True)


def multiply(left: Tensor, right: Tensor, out: Tensor, start: Tensor | None) -> None:
    """Write ``left @ right + start`` to ``out``, which is contiguous."""
    depth, columns = right.shape
    line = 0 if start is None or start.dim() == 1 else start.stride(0)
    matrices = (_Matrix(each.data_ptr(), *each.stride()) for each in (left, right))
    sizes = map(c_int64, (len(left), columns, depth))
    threads = c_int(torch.get_num_threads())
    places = _address(start), c_int64(line), _address(out)
    _LIBRARY.multiply_float32(*map(byref, matrices), *places, *sizes, threads)


def _address(tensor: Tensor | None) -> c_void_p | None:
    return None if tensor is None else c_void_p(tensor.data_ptr())
