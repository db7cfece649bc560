"""A block from its norm to its projection as one function, for GPUs: in few kernels.

There PyTorch's own operations go over the expanded features some twenty times, forward
and backward, and calling a hundred kernels takes a CPU longer than a GPU needs to run
them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import kernels
from .grn import EPS, GRN, normalise
from .mlp import are_as_built, differentiate
from .shortcuts import dtype_of, is_plain

# Products of 16 bits that are not rounded to them; PyTorch 2.8 cannot compile them.
_HAS_OUT_DTYPE = torch.__version__ >= '2.10'

if kernels.HAS_TRITON:
    from .kernels.gpu import mlp as gpu
    from .kernels.gpu import on_device_of


def is_quicker_as_one(
    x: Tensor,
    norm: nn.LayerNorm,
    pwconv1: nn.Module,
    act: nn.Module,
    grn: GRN,
    pwconv2: nn.Module,
) -> bool:
    """Tell whether :func:`normalise_and_project` is the quick way.

    Args:
        x (Tensor): Features, ``(N, ..., C)``.
        norm (nn.LayerNorm): What stands in the place of the norm.
        pwconv1 (nn.Module): In that of the expansion.
        act (nn.Module): In that of GELU.
        grn (GRN): In that of GRN.
        pwconv2 (nn.Module): In that of the projection.

    Returns:
        bool: Whether there are kernels for it, and nobody would miss the layers' calls.
    """
    if x.is_cpu or x.numel() == 0:
        return False
    if not is_plain(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return False
    if not norm.weight.shape == norm.bias.shape == x.shape[-1:]:
        return False
    if not are_as_built(x.shape[-1], pwconv1, act, grn, pwconv2):
        return False
    fits = kernels.fit(x, norm.weight, grn.gamma)
    return fits and kernels.fit_dtype(x, dtype_of(x))


def normalise_and_project(
    x: Tensor, norm: nn.LayerNorm, pwconv1: nn.Linear, grn: GRN, pwconv2: nn.Linear
) -> Tensor:
    """Compute ``pwconv2(grn(gelu(pwconv1(norm(x)))))``.

    Args:
        x (Tensor): Features, ``(N, ..., C)``.
        norm (nn.LayerNorm): Of ``C`` channels.
        pwconv1 (nn.Linear): From ``C`` channels to ``D``.
        grn (GRN): GRN of ``D`` channels.
        pwconv2 (nn.Linear): From ``D`` channels to ``C``.

    Returns:
        Tensor: Features of the same shape, in the dtype of ``x``, or in autocast's.
    """
    inputs = (
        *(x.flatten(1, -2), norm.weight, norm.bias, pwconv1.weight, pwconv1.bias),
        *(grn.gamma, grn.beta, pwconv2.weight, pwconv2.bias),
    )
    # Kernels go by addresses alone.
    tokens, *parameters = (each.contiguous() for each in inputs)
    with on_device_of(x):
        out = _NormaliseAndProject.apply(tokens, norm.eps, dtype_of(x), *parameters)
    return out.view_as(x)


class _NormaliseAndProject(torch.autograd.Function):
    """The same of ``(N, P, C)``.

    Kept for the backward pass are what enters the norm and the expansion, and what
    comes out of the latter, without its bias.
    """

    @staticmethod
    def forward(ctx, x, eps, dtype, *parameters) -> Tensor:
        weight, bias, weight1, bias1, gamma, beta, weight2, bias2 = parameters
        weights = weight1.to(dtype), weight2.to(dtype)
        y, statistics = gpu.layer_norm(x, weight, bias, eps, dtype)
        hidden = functional.linear(y, weights[0])
        norm, scale = gpu.grn_scale(gpu.gelu_squares(hidden, bias1), gamma, EPS)
        active = gpu.gelu_scaled(hidden, bias1, scale, beta)
        ctx.eps, ctx.dtype = eps, dtype
        kept = statistics, y, hidden, norm, scale, *weights
        ctx.save_for_backward(x, *parameters, *kept)
        return functional.linear(active, weights[1], bias2.to(dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, grad)
        x, weight, _, weight1, bias1, gamma, beta, weight2, _, *kept = ctx.saved_tensors
        statistics, y, hidden, norm, scale, *weights = kept
        grad = grad.contiguous()
        grad_hidden = grad @ weights[1]
        products = gpu.gelu_products(hidden, bias1, grad_hidden)
        of_scale, slope = gpu.grn_slope(products, gamma, norm, EPS)
        lines = scale, beta, slope, of_scale
        # It becomes the gradient of the expansion.
        active, sums = gpu.gelu_backward(hidden, bias1, *lines, grad_hidden)
        grad_y = grad_hidden @ weights[0]
        grad_x, of_norm = gpu.layer_norm_backward(x, grad_y, weight, statistics, grad)
        of_weight, of_bias, of_bias2 = of_norm
        of_bias1, of_beta, of_gamma = sums
        *_, of_weight1, _, _, _, of_weight2, _ = ctx.needs_input_grad
        grad_weight1 = _product(grad_hidden, y, weight1) if of_weight1 else None
        grad_weight2 = _product(grad, active, weight2) if of_weight2 else None
        return (
            *(grad_x, None, None, of_weight, of_bias, grad_weight1, of_bias1),
            *(of_gamma.view_as(gamma), of_beta.view_as(beta), grad_weight2, of_bias2),
        )


def _differentiable_gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Go back through the layers, one after the other, by operations with a graph."""
    x, *parameters = inputs = ctx.saved_tensors[:9]
    weight, bias, *others, gamma, beta, weight2, bias2 = parameters
    pairs = (others, (weight2, bias2))
    first, second = ([each.to(ctx.dtype) for each in pair] for pair in pairs)
    y = functional.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, ctx.eps)
    active = functional.gelu(functional.linear(y.to(ctx.dtype), *first))
    out = functional.linear(normalise(active, gamma, beta), *second)
    needed = [each for i, each in enumerate(ctx.needs_input_grad) if i not in (1, 2)]
    grad_x, *grads = differentiate(out, inputs, needed, grad)
    return grad_x, None, None, *grads


def _product(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """Return ``left.T @ right`` of all rows, as exact as the weight it is of."""
    left, right = left.flatten(0, 1).t(), right.flatten(0, 1)
    rounds = left.dtype != weight.dtype == torch.float32
    if rounds and left.is_cuda and _HAS_OUT_DTYPE:
        return torch.mm(left, right, out_dtype=weight.dtype)
    return left @ right
