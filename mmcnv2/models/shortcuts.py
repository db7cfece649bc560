"""When layers may be computed by quicker means than one after the other."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

# With less, oneDNN's kernels are not the quick ones.
_HAS_AVX = torch.backends.cpu.get_cpu_capability().startswith('AVX')


def is_traced() -> bool:
    """Tell whether a compiler or an exporter looks on, which wants plain operations."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_observed(*modules: nn.Module) -> bool:
    """Tell whether anyone would miss the calls of modules, by hooks of any kind.

    Counters of operations put theirs on all modules at once.
    """
    hooks = (
        '_forward_hooks',
        '_forward_pre_hooks',
        '_backward_hooks',
        '_backward_pre_hooks',
    )
    own = any(getattr(module, name) for module in modules for name in hooks)
    return own or bool(_has_any_global_hook())


def dtype_of(x: Tensor) -> torch.dtype:
    """Return the dtype that a layer computes in: autocast's if it is on."""
    device = x.device.type
    autocasts = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocasts else x.dtype


def autocast(x: Tensor, layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Cast what a layer computes with, as autocast does for PyTorch's own.

    Args:
        x (Tensor): Its input.
        layer (nn.Conv2d | nn.Linear): The layer, which has a bias.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Input, weight and bias in one dtype: autocast's
        if it is on, or else that of the input.
    """
    dtype = dtype_of(x)
    return x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype)


def has_onednn(x: Tensor) -> bool:
    """Tell whether oneDNN computes on a tensor, with the kernels that are quick."""
    onednn = torch.backends.mkldnn
    return x.is_cpu and _HAS_AVX and onednn.is_available() and bool(onednn.enabled)
