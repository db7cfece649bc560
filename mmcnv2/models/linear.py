"""The product of a linear layer, by the quickest kernel there is."""

import torch
from torch import Tensor
from torch.nn import functional

from .shortcuts import has_onednn

# What torch.compile calls for linear layers on CPUs. PyTorch itself calls BLAS, which
# is slower for shapes as tall as ours, and adds to a bias that is written out before.
_BY_ONEDNN = getattr(torch.ops.mkldnn, '_linear_pointwise', None)
_LARGE = 1 << 18  # elements, which do not fit into a core's cache


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ weight.T + bias``, in functions with a backward of their own.

    Args:
        x (Tensor): ``(..., C)``.
        weight (Tensor): ``(D, C)``.
        bias (Tensor, optional): ``(D,)``.

    Returns:
        Tensor: ``(..., D)``.
    """
    fits = x.dtype == torch.float32 and _BY_ONEDNN is not None and has_onednn(x)
    # oneDNN writes a turned weight out anew, which takes as long as the product where
    # it is large; BLAS takes it as it lies.
    turned = not weight.is_contiguous() and weight.numel() >= _LARGE
    # oneDNN reads a bias as if it were contiguous.
    fits = fits and (bias is None or bias.is_contiguous())
    if not fits or turned:
        return functional.linear(x, weight, bias)
    return _BY_ONEDNN(x, weight, bias, 'none', [], '')
