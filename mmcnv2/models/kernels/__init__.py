"""Kernels for CPUs, in C++, which setup.py compiles where there is a compiler.

They are plain functions of a shared library and take tensors by the address of their
data, so that they fit any version of PyTorch. Where they are absent, or do not fit a
tensor, PyTorch's own operations compute the same.
"""

import warnings
from collections.abc import Callable
from ctypes import CDLL, Structure, byref, c_int, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from ..shortcuts import is_ordinary, is_traced
from ..tiles import Tiles

_INTERFACE = 4  # of lanes.h
_LANES = 8  # channels that are computed at a time
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


def are_compiled() -> bool:
    """Tell whether there are any.

    Returns:
        bool: Whether setup.py could compile them here, and they load.
    """
    return _LIBRARY is not None


def fit(x: Tensor, *others: Tensor) -> bool:
    """Tell whether kernels compute on tensors.

    Args:
        x (Tensor): Features, ``(..., C)``.
        *others (Tensor): Weights.

    Returns:
        bool: Whether there are kernels, all tensors are ordinary memory of a CPU, and
        the channels of ``x`` are a multiple of 8. Never while a model is traced or
        compiled.
    """
    if is_traced() or _LIBRARY is None:
        return False
    fits = x.shape[-1] % _LANES == 0
    return fits and all(each.is_cpu and is_ordinary(each) for each in (x, *others))


def convolve(x: Tensor, taps: Tensor, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """Convolve each channel of tiles by itself with a kernel of 7 x 7.

    Args:
        x (Tensor): Features, ``(N, ..., C)``, in float32 or bfloat16.
        taps (Tensor): The kernel, ``(49, C)``, in float32.
        bias (Tensor, optional): ``(C,)``, in float32.
        tiles (Tiles): How the positions of ``x`` lie in pictures.

    Returns:
        Tensor: Of shape and dtype of ``x``.
    """
    x, taps = x.contiguous(), taps.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty_like(x)
    _run('convolve', _describe(tiles, x), x, taps, bias, out)
    return out


def sum_gradients(x: Tensor, grad: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Compute the gradients of that kernel and its bias.

    Args:
        x (Tensor): Features, ``(N, ..., C)``, in float32 or bfloat16.
        grad (Tensor): Gradient of the output, of the same shape and dtype.
        tiles (Tiles): How their positions lie in pictures.

    Returns:
        tuple[Tensor, Tensor]: Those of the kernel, ``(49, C)``, and of the bias,
        ``(C,)``, in float32.
    """
    x, grad = x.contiguous(), grad.contiguous()
    described = _describe(tiles, x)
    groups = -(-described.count // described.group)
    sums = x.new_zeros(groups, 50, x.shape[-1], dtype=torch.float32)
    _run('sum_gradients', described, x, grad, sums)
    whole = sums.sum(0)
    return whole[:-1], whole[-1]


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


def _run(name: str, tiles: _Tiles, x: Tensor, *tensors: Tensor | None) -> None:
    """Call a function of depthwise.cpp for the dtype of ``x``."""
    threads = c_int(torch.get_num_threads())
    _kernel(name, x)(byref(tiles), *map(_address, (x, *tensors)), threads)


def _kernel(name: str, x: Tensor) -> Callable:
    dtype = str(x.dtype).removeprefix('torch.')
    return getattr(_LIBRARY, f'{name}_{dtype}')


def sum_gelu(name: str, x: Tensor, *tensors: Tensor | None) -> Tensor:
    """Run a function of gelu.cpp, which tells what it takes and does.

    Args:
        name (str): Of the function, without the dtype.
        x (Tensor): Features, ``(N, P, C)``, contiguous as all others.
        *tensors (Tensor, optional): What else it takes before its sums.

    Returns:
        Tensor: Its sums over positions, ``(N, 1, C)``, in float32.
    """
    chunks = -(-x.shape[1] // _CHUNK)
    sums = x.new_zeros(len(x), chunks, x.shape[-1], dtype=torch.float32)
    addresses = map(_address, (x, *tensors, sums))
    threads = c_int(torch.get_num_threads())
    sizes = map(c_int64, (*x.shape, _CHUNK))
    _kernel(name, x)(*sizes, *addresses, threads)
    return sums.sum(1, keepdim=True)


def _address(tensor: Tensor | None) -> c_void_p | None:
    return None if tensor is None else c_void_p(tensor.data_ptr())
