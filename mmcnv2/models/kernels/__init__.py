"""Kernels of our own: for CPUs in C++, for GPUs in Triton.

Where there are none, or they do not fit a tensor, PyTorch's own operations compute the
same.
"""

import warnings
from contextlib import suppress
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..shortcuts import is_ordinary, is_traced, only_takes_pytorch
from ..tiles import Tiles
from . import cpu, operators

HAS_TRITON = False
# Triton 3.2, which belongs to PyTorch 2.6, cannot compile them.
if torch.version.cuda and torch.__version__ >= '2.7':
    with suppress(ImportError):
        from .gpu import depthwise as gpu_depthwise
        from .gpu import mlp as gpu_mlp
        from .gpu import on_device_of

        HAS_TRITON = True

# Of Ampere; they have run on nothing older.
_CAPABILITY = 8
# Of CPUs, each of which packs matrices of its own before it multiplies.
_FEW_THREADS = 8


def are_compiled() -> bool:
    """Tell whether there are any for CPUs.

    Returns:
        bool: Whether setup.py could compile them here, and they load.
    """
    return cpu.is_loaded()


def fit(x: Tensor, *others: Tensor) -> bool:
    """Tell whether kernels compute on tensors.

    Args:
        x (Tensor): Features, ``(..., C)``.
        *others (Tensor): Weights.

    Returns:
        bool: Whether all tensors are ordinary memory of a device for which there are
        kernels; on CPUs they take channels in multiples of 8. While a model is exported
        or a function transformed by ``torch.func`` none does (but for strict exports
        from GPUs, which PyTorch before 2.13 cannot tell from compiling).
    """
    tensors = x, *others
    if not all(each.device == x.device and is_ordinary(each) for each in tensors):
        return False
    if only_takes_pytorch(x):
        return False
    if x.is_cpu:
        return cpu.is_loaded() and x.shape[-1] % cpu.LANES == 0
    if not (HAS_TRITON and x.is_cuda):
        return False
    if torch.cuda.get_device_properties(x.device).major < _CAPABILITY:
        return False
    # A compiler starts Triton itself.
    return is_traced() or _is_working(x.device)


@cache
def _is_working(device: torch.device) -> bool:
    """Try whether Triton, which needs a C compiler, can start kernels on a GPU."""
    one = torch.ones(1, 1, 1, dtype=torch.float32, device=device)
    try:
        with on_device_of(one):
            gpu_mlp.grn_scale(one, one, eps=1.0)
    # In whichever of many ways it fails.
    except Exception as error:
        warnings.warn(
            f'the kernels of mmcnv2 for GPUs are not used on {device}, which is slower '
            f'without: {error}. Triton needs a C compiler and the headers of Python: '
            'apt-get install gcc python3-dev',
            stacklevel=3,
        )
        return False
    return True


def fit_products(*matrices: Tensor) -> bool:
    """Tell whether products of matrices are quicker by a kernel of our own.

    Args:
        *matrices (Tensor): Those that are multiplied.

    Returns:
        bool: Whether they are: in float32, by a few threads of a CPU whose widest
        registers are those of AVX2. For wider ones there is none.
    """
    if not cpu.is_loaded() or is_traced() or torch.get_num_threads() > _FEW_THREADS:
        return False
    return torch.backends.cpu.get_cpu_capability() == 'AVX2' and all(
        each.is_cpu and each.dtype == torch.float32 and is_ordinary(each)
        for each in matrices
    )


def fit_dtype(x: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether kernels take features in a dtype.

    Args:
        x (Tensor): Features.
        dtype (torch.dtype): What they are cast to.

    Returns:
        bool: Whether it is float32, bfloat16, or, on GPUs, float16.
    """
    if dtype in (torch.float32, torch.bfloat16):
        return True
    return dtype == torch.float16 and not x.is_cpu


def convolve(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    tiles: Tiles | None,
    turned: bool,
) -> Tensor:
    """Convolve each channel of tiles by itself with a kernel of 7 x 7.

    Args:
        x (Tensor): Features, ``(N, ..., C)``.
        taps (Tensor): The kernel, ``(49, C)``.
        bias (Tensor, optional): ``(C,)``.
        tiles (Tiles, optional): How the positions of ``x`` lie in pictures. Whole
            pictures ``(N, H, W, C)`` need none.
        turned (bool): Whether the kernel is turned by half, as it is on the way back.

    Returns:
        Tensor: Of shape and dtype of ``x``.
    """
    return _kernels_for(x).convolve(x.contiguous(), taps, bias, tiles, turned)


def sum_gradients(
    x: Tensor, grad: Tensor, tiles: Tiles | None
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of that kernel and its bias.

    Args:
        x (Tensor): Features, ``(N, ..., C)``.
        grad (Tensor): Gradient of the output, of the same shape and dtype.
        tiles (Tiles, optional): How their positions lie in pictures, as above.

    Returns:
        tuple[Tensor, Tensor]: Those of the kernel, ``(49, C)``, and of the bias,
        ``(C,)``, in float32.
    """
    whole = _kernels_for(x).sum_gradients(x.contiguous(), grad.contiguous(), tiles)
    return whole[:-1], whole[-1]


def _kernels_for(x: Tensor) -> ModuleType:
    if not x.is_cpu:
        return gpu_depthwise
    return operators if is_traced() else cpu
