"""The product of a linear layer, by the quickest kernel there is."""

import torch
from torch import Tensor
from torch.nn import functional

# What torch.compile calls for linear layers on CPUs. PyTorch itself calls BLAS, which
# is slower for shapes as tall as ours, and adds to a bias that is written out before.
_BY_ONEDNN = getattr(torch.ops.mkldnn, '_linear_pointwise', None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ weight.T + bias``, where no gradient is recorded.

    Args:
        x (Tensor): Rows, ``(P, C)``.
        weight (Tensor): ``(D, C)``.
        bias (Tensor, optional): ``(D,)``.

    Returns:
        Tensor: ``(P, D)``.
    """
    if x.dtype != torch.float32 or not _has_onednn(x):
        return functional.linear(x, weight, bias)
    return _BY_ONEDNN(x, weight, bias, 'none', [], '')


def _has_onednn(x: Tensor) -> bool:
    known = torch.backends.cpu.get_cpu_capability().startswith('AVX')
    return x.device.type == 'cpu' and known and _BY_ONEDNN is not None
