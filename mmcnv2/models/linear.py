"""Products of features and weights, by the quickest kernel there is."""

import torch
from torch import Tensor
from torch.nn import functional

from .kernels import cpu, fit_products
from .shortcuts import has_onednn

# What torch.compile calls for linear layers on CPUs. PyTorch itself calls BLAS, which
# is slower for shapes as tall as ours, and adds to a bias that is written out before.
_BY_ONEDNN = getattr(torch.ops.mkldnn, '_linear_pointwise', None)
_LARGE = 1 << 18  # elements, which do not fit into a core's cache


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Compute ``x @ weight.T + bias``, in functions with a backward of their own.

    Args:
        x (Tensor): ``(..., C)``.
        weight (Tensor): ``(D, C)``.
        bias (Tensor, optional): ``(D,)``.
        out (Tensor, optional): Where to put it, contiguous, ``(..., D)``.

    Returns:
        Tensor: ``(..., D)``.
    """
    if fit_products(x, weight):
        out = x.new_empty(*x.shape[:-1], len(weight)) if out is None else out
        bias = None if bias is None else bias.contiguous()
        # The view fails where ``out`` is not contiguous.
        cpu.multiply(_rows(x), weight.t(), out.view(-1), bias)
        return out
    product = _linear(x, weight, bias)
    return product if out is None else out.copy_(product)


def add_product(sums: Tensor, left: Tensor, right: Tensor, begun: bool) -> None:
    """Add ``left.T @ right`` of all rows to what there is: a gradient of weights.

    Args:
        sums (Tensor): What it is added to, ``(C, D)``, contiguous.
        left (Tensor): ``(..., C)``.
        right (Tensor): ``(..., D)``.
        begun (bool): Whether there is anything yet, or ``sums`` are nothing but memory.
    """
    left, right = _rows(left).t(), _rows(right)
    if fit_products(left, right):
        cpu.multiply(left, right, sums, sums if begun else None)
    else:
        sums.addmm_(left, right, beta=int(begun))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    fits = x.dtype == torch.float32 and _BY_ONEDNN is not None and has_onednn(x)
    # oneDNN writes a turned weight out anew, which takes as long as the product where
    # it is large; BLAS takes it as it lies.
    turned = not weight.is_contiguous() and weight.numel() >= _LARGE
    # oneDNN reads a bias as if it were contiguous.
    fits = fits and (bias is None or bias.is_contiguous())
    if not fits or turned:
        return functional.linear(x, weight, bias)
    return _BY_ONEDNN(x, weight, bias, 'none', [], '')


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)
