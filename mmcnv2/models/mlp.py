"""Expansion, GELU, GRN and projection of a block as one function, by parts."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from .gelu import gelu_backward, gelu_products, gelu_squares
from .grn import GRN, normalise, scale_of, through_scale, total
from .linear import add_product, linear
from .shortcuts import autocast, dtype_of, is_ordinary, is_plain, is_traced

# Expanded features that are dealt with at a time: what a last-level cache holds.
_PART = 1 << 22


def is_quicker_by_parts(
    x: Tensor, pwconv1: nn.Module, act: nn.Module, grn: nn.Module, pwconv2: nn.Module
) -> bool:
    """Tell whether :func:`expand_and_project` is the quick way.

    It is on CPUs, in 32 and 64 bits, and in bfloat16 where no gradients are wanted.

    Args:
        x (Tensor): Features, ``(N, ..., C)``.
        pwconv1 (nn.Module): What stands in the place of the expansion.
        act (nn.Module): In that of GELU.
        grn (nn.Module): In that of GRN.
        pwconv2 (nn.Module): In that of the projection.

    Returns:
        bool: Whether it is. Never while a model is traced or compiled, nor where there
        are other layers than a block was built with, or observed ones.
    """
    dtypes = [torch.float32, torch.float64]
    dtypes += [] if torch.is_grad_enabled() else [torch.bfloat16]
    fits = x.is_cpu and is_ordinary(x) and dtype_of(x) in dtypes and x.numel() > 0
    if not fits or is_traced():
        return False
    return are_as_built(pwconv1, act, grn, pwconv2)


def are_as_built(
    pwconv1: nn.Module, act: nn.Module, grn: nn.Module, pwconv2: nn.Module
) -> bool:
    """Tell whether these are the layers that a block was built with, unobserved.

    Args:
        pwconv1 (nn.Module): What stands in the place of the expansion.
        act (nn.Module): In that of GELU.
        grn (nn.Module): In that of GRN.
        pwconv2 (nn.Module): In that of the projection.

    Returns:
        bool: Whether they are.
    """
    linears = is_plain(pwconv1, nn.Linear) and is_plain(pwconv2, nn.Linear)
    if not linears or pwconv1.bias is None or pwconv2.bias is None:
        return False
    return is_plain(grn, GRN) and is_plain(act, nn.GELU) and act.approximate == 'none'


def expand_and_project(
    x: Tensor, pwconv1: nn.Linear, grn: GRN, pwconv2: nn.Linear
) -> Tensor:
    """Compute ``pwconv2(grn(gelu(pwconv1(x))))``.

    The expanded features are several times as wide as the rest. They go through all of
    this by parts that a cache holds, of a few small pictures or of one that is large.
    What enters GELU is all that is kept of them for the backward pass. A backward pass
    that is to be differentiated itself goes by the layers, one after the other.

    Args:
        x (Tensor): Features, ``(N, ..., C)``.
        pwconv1 (nn.Linear): From ``C`` channels to ``D``.
        grn (GRN): GRN of ``D`` channels.
        pwconv2 (nn.Linear): From ``D`` channels to ``C``.

    Returns:
        Tensor: Features of the same shape, in the dtype of ``x``, or in autocast's.
    """
    tokens, *first = autocast(x.flatten(1, -2), pwconv1)
    _, *second = autocast(tokens, pwconv2)
    keep = torch.is_grad_enabled()
    out = _ExpandAndProject.apply(tokens, *first, grn.gamma, grn.beta, *second, keep)
    return out.view_as(x)


class _ExpandAndProject(torch.autograd.Function):
    """The same of ``(N, P, C)``."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, gamma, beta, weight2, bias2, keep) -> Tensor:
        keep = keep and any(ctx.needs_input_grad)
        inputs = x, weight1, bias1, gamma, beta, weight2, bias2
        gamma, beta = gamma.flatten(), beta.flatten().to(x.dtype)
        precise = torch.promote_types(x.dtype, torch.float32)
        norms, scales = x.new_empty(2, len(x), 1, len(weight1), dtype=precise)
        out, kept = x.new_empty(x.shape), []
        for pictures, parts in _groups(x, len(weight1)):
            hidden = [linear(x[part], weight1, bias1) for part in parts]
            kept += hidden if keep else []
            pairs = [gelu_squares(h, in_place=not keep) for h in hidden]
            active, squares = zip(*pairs, strict=True)
            norm = norms[pictures] = total(squares).sqrt_()
            scale = scales[pictures] = scale_of(gamma, norm)
            scale = scale.to(x.dtype)
            for part, a in zip(parts, active, strict=True):
                torch.addcmul(beta, a, scale, out=a)
                linear(a, weight2, bias2, out=out[part])
        ctx.save_for_backward(*inputs, norms, scales, *kept)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, grad), None
        x, weight1, _, gamma, beta, weight2, _, norms, scales, *kept = ctx.saved_tensors
        shape, gamma, beta = gamma.shape, gamma.flatten(), beta.flatten().to(x.dtype)
        grad_x, grad_bias2 = x.new_empty(x.shape), grad.sum((0, 1))
        grad_bias1, grad_gamma = torch.zeros_like(gamma), torch.zeros_like(gamma)
        grad_weight1 = grad_weight2 = None
        _, of_weight1, *_, of_weight2, _, _ = ctx.needs_input_grad
        remaining = iter(kept)
        for pictures, parts in _groups(x, len(weight1)):
            hidden = list(islice(remaining, len(parts)))
            grads = [linear(grad[part], weight2.t()) for part in parts]
            products = total(map(gelu_products, hidden, grads))
            of_gamma, slope = through_scale(products, gamma, norms[pictures])
            grad_gamma += of_gamma
            scale = scales[pictures]
            for part, h, g in zip(parts, hidden, grads, strict=True):
                a, sums = gelu_backward(h, scale, beta, slope, g)
                grad_bias1 += sums.sum((0, 1))
                linear(g, weight1.t(), out=grad_x[part])
                if of_weight1:
                    grad_weight1 = add_product(grad_weight1, g, x[part])
                if of_weight2:
                    grad_weight2 = add_product(grad_weight2, grad[part], a)
        grad_beta = weight2.t() @ grad_bias2
        return (
            *(grad_x, grad_weight1, grad_bias1, grad_gamma.view(shape)),
            *(grad_beta.view(shape), grad_weight2, grad_bias2, None),
        )


def _differentiable_gradients(ctx, grad: Tensor) -> Iterator[Tensor | None]:
    """Go back through the layers, one after the other, by operations with a graph."""
    x, weight1, bias1, gamma, beta, weight2, bias2, *_ = ctx.saved_tensors
    active = functional.gelu(functional.linear(x, weight1, bias1))
    out = functional.linear(normalise(active, gamma, beta), weight2, bias2)
    inputs = x, weight1, bias1, gamma, beta, weight2, bias2
    return differentiate(out, inputs, ctx.needs_input_grad[: len(inputs)], grad)


def differentiate(
    out: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> Iterator[Tensor | None]:
    """Go back to those inputs that need gradients, which get a graph of their own."""
    wanted = [each for each, needs in zip(inputs, needed, strict=True) if needs]
    grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return (next(grads) if needs else None for needs in needed)


def _groups(x: Tensor, wide: int) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Divide pictures into groups, and each group into parts.

    Several small pictures are one part; a large one is a group of several parts.
    """
    count, positions, _ = x.shape
    within = list(_slices(positions, _PART // wide))
    for pictures in _slices(count, _PART // (positions * wide)):
        yield pictures, [(pictures, part) for part in within]


def _slices(count: int, size: int) -> Iterator[slice]:
    """Cut into equal slices of ``size`` at most, of which the last may be shorter."""
    size = math.ceil(count / math.ceil(count / max(size, 1)))
    return (slice(i, min(i + size, count)) for i in range(0, count, size))
