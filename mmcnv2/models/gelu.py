"""GELU and what a block does around it, by one kernel where there is one.

All take contiguous features ``(N, P, C)`` and return sums over positions,
``(N, 1, C)``, in 32 bits at least.
"""

import torch
from torch import Tensor

from . import kernels
from .grn import sum_of_products

# Those that functional has not: where results go to be given.
_gelu = torch.ops.aten.gelu.out
_gelu_backward = torch.ops.aten.gelu_backward.grad_input


def gelu_products(
    x: Tensor, grad: Tensor | None = None, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute GELU, and the sums of its products with a gradient, or of its squares.

    Args:
        x (Tensor): Features, ``(N, P, C)``.
        grad (Tensor, optional): The gradient, of the same shape. Defaults to GELU
            itself, which gives its squares.
        in_place (bool): Whether GELU takes the place of ``x``. Defaults to False.

    Returns:
        tuple[Tensor, Tensor]: GELU, and the sums.
    """
    active = x if in_place else torch.empty_like(x)
    if _fits(x, torch.float32, torch.bfloat16):
        return active, kernels.sum_gelu('gelu_products', x, grad, active)
    _gelu(x, out=active)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return active, sum_of_products(active, active if grad is None else grad, dtype)


def gelu_backward(
    x: Tensor, scale: Tensor, shift: Tensor, slope: Tensor, grad: Tensor, active: Tensor
) -> Tensor:
    """Go from the gradient of GELU, scaled and shifted, to that of what entered GELU.

    Args:
        x (Tensor): What entered GELU, ``(N, P, C)``.
        scale (Tensor): ``(N, 1, C)``.
        shift (Tensor): ``(C,)``.
        slope (Tensor): ``(N, 1, C)``: so much of itself GELU adds to its gradient, by
            way of the scale.
        grad (Tensor): That of what is shifted, ``(N, P, C)``; becomes that of ``x``.
        active (Tensor): GELU of ``x``; becomes the shifted.

    Returns:
        Tensor: The sums of the gradient.
    """
    if _fits(x, torch.float32):
        factors = (each.to(x.dtype) for each in (scale, shift, slope))
        return kernels.sum_gelu('gelu_backward', x, *factors, grad, active)
    grad.mul_(scale).addcmul_(active, slope)
    _gelu_backward(grad, x, grad_input=grad)
    torch.addcmul(shift, active, scale, out=active)
    return grad.sum(1, keepdim=True)


def _fits(x: Tensor, *dtypes: torch.dtype) -> bool:
    return x.dtype in dtypes and kernels.fit(x)
