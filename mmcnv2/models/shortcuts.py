"""When layers may be computed by quicker means than one after the other."""

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

M = TypeVar('M', bound=nn.Module)

# Before, it told of exporting under torch.compile too.
_TELLS_EXPORTS = torch.__version__ >= '2.13'
# With less, oneDNN's kernels are not the quick ones.
_HAS_AVX = torch.backends.cpu.get_cpu_capability().startswith('AVX')


def is_traced() -> bool:
    """Tell whether a compiler or an exporter looks on."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_recorded(x: Tensor) -> bool:
    """Tell whether what is done to a tensor will be done to other values unseen.

    By what a compiler or an exporter makes of it, or by a CUDA graph. It must not look
    at the values then.
    """
    return is_traced() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def is_transformed() -> bool:
    """Tell whether a transform of ``torch.func`` looks on.

    Functions of ours would know neither batches nor which gradients are wanted there.
    """
    return torch._C._are_functorch_transforms_active()


def only_takes_pytorch(x: Tensor) -> bool:
    """Tell whether PyTorch's own operations are all that may be done to a tensor.

    So it is in transforms, and where a model is exported, to where kernels of ours are
    unknown. Strict exports compile. Where PyTorch cannot tell them apart, compiling is
    taken for exporting on CPUs, from which most are exported.
    """
    if is_transformed():
        return True
    if not torch.compiler.is_dynamo_compiling():
        return is_traced()
    return torch.compiler.is_exporting() if _TELLS_EXPORTS else x.is_cpu


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Tell whether a module is what its class says, and nobody would miss its call.

    Args:
        module (nn.Module): What stands in the place of a layer.
        kind (type[nn.Module]): The layer's class.

    Returns:
        bool: Whether it is of this very class, without a ``forward`` of its own,
        without hooks of any kind (counters of operations put theirs on all modules at
        once), and with ordinary tensors as parameters: others, such as quantised ones,
        know what to do in PyTorch's own operations alone.
    """
    if type(module) is not kind or 'forward' in module.__dict__:
        return False
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    of_all_modules = (
        *(modules._global_forward_hooks, modules._global_forward_pre_hooks),
        *(modules._global_backward_hooks, modules._global_backward_pre_hooks),
    )
    if any(hooks) or any(of_all_modules):
        return False
    return all(map(is_ordinary, module.parameters()))


def is_ordinary(tensor: Tensor) -> bool:
    """Tell whether a tensor is none of a subclass.

    Those may have no memory of their own, or not all of it.
    """
    return type(tensor) in (Tensor, nn.Parameter)


def dtype_of(x: Tensor) -> torch.dtype:
    """Return the dtype that a layer computes in: autocast's, where that casts."""
    # Which autocast leaves alone.
    if x.dtype == torch.float64 or x.is_meta:
        return x.dtype
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
