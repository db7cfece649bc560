"""GELU and what a block does around it, by one kernel where there is one.

All take contiguous features ``(N, P, C)``, and return sums over positions,
``(N, 1, C)`` unless said otherwise, in 32 bits at least.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .grn import sum_of_products
from .kernels import cpu, fit

# Those that functional has not: where results go to be given.
_gelu = torch.ops.aten.gelu.out
_gelu_backward = torch.ops.aten.gelu_backward.grad_input


def gelu_squares(x: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """Compute GELU, and the sums of its squares.

    Args:
        x (Tensor): Features, ``(N, P, C)``.
        in_place (bool): Whether GELU takes the place of ``x``. Defaults to False.

    Returns:
        tuple[Tensor, Tensor]: GELU, and the sums.
    """
    active = x if in_place else torch.empty_like(x)
    if _fits(x, torch.float32, torch.bfloat16):
        return active, cpu.sum_gelu('gelu_squares', x, active)
    _gelu(x, out=active)
    return active, sum_of_products(active, active)


def gelu_products(x: Tensor, grad: Tensor) -> Tensor:
    """Sum the products of GELU and a gradient, and the gradient.

    Args:
        x (Tensor): What enters GELU, ``(N, P, C)``.
        grad (Tensor): The gradient, of the same shape.

    Returns:
        Tensor: Both sums, ``(N, 2, C)``.
    """
    if _fits(x, torch.float32):
        return cpu.sum_gelu('gelu_products', x, grad, sums=2)
    products = sum_of_products(functional.gelu(x), grad)
    return torch.cat([products, grad.sum(1, keepdim=True)], dim=1)


def gelu_backward(
    x: Tensor, scale: Tensor, shift: Tensor, slope: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Go back through GELU, scaled and shifted, which is computed again.

    Args:
        x (Tensor): What entered GELU, ``(N, P, C)``.
        scale (Tensor): ``(N, 1, C)``.
        shift (Tensor): ``(C,)``.
        slope (Tensor): ``(N, 1, C)``: so much of itself GELU adds to its gradient, by
            way of the scale.
        grad (Tensor): That of what is shifted, ``(N, P, C)``; becomes that of ``x``.

    Returns:
        tuple[Tensor, Tensor]: GELU, scaled and shifted, and the sums of the gradient.
    """
    if _fits(x, torch.float32):
        out = torch.empty_like(x)
        factors = [each.to(x.dtype).contiguous() for each in (scale, shift, slope)]
        return out, cpu.sum_gelu('gelu_backward', x, *factors, grad, out)
    active = functional.gelu(x)
    grad.mul_(scale).addcmul_(active, slope)
    _gelu_backward(grad, x, grad_input=grad)
    torch.addcmul(shift, active, scale, out=active)
    return active, grad.sum(1, keepdim=True)


def _fits(x: Tensor, *dtypes: torch.dtype) -> bool:
    return x.is_cpu and x.dtype in dtypes and fit(x)
