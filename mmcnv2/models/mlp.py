"""Expansion, GELU, GRN and projection of a block as one function, by parts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .gelu import gelu_backward, gelu_products, gelu_squares
from .grn import EPS, GRN, normalise, scale_of, through_scale, total
from .kernels import cpu, fit, fit_products
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
        x, layers = _prepare(*inputs)
        groups, parts = _divide(x, len(weight1))
        at_once = _fits_at_once(parts, x, layers)
        run = _forward_at_once if at_once else partial(_forward_by_parts, parts)
        precise = torch.promote_types(x.dtype, torch.float32)
        norms, scales = x.new_empty(2, len(x), 1, len(weight1), dtype=precise)
        out, kept = torch.empty_like(x), []
        for group in groups:
            hidden = run(layers, keep, *(t[group] for t in (x, norms, scales, out)))
            kept += hidden if keep else []
        ctx.save_for_backward(*inputs, norms, scales, *kept)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, grad), None
        *inputs, norms, scales = islice(saved := iter(ctx.saved_tensors), 9)
        x, layers = _prepare(*inputs)
        grad = grad.contiguous()
        groups, parts = _divide(x, len(layers.weight1))
        at_once = _fits_at_once(parts, x, layers)
        run = _backward_at_once if at_once else partial(_backward_by_parts, parts)
        grad_x, grads = torch.empty_like(x), _Gradients.of(layers, ctx.needs_input_grad)
        for group in groups:
            hidden = list(islice(saved, len(parts)))
            tensors = (t[group] for t in (x, norms, scales, grad, grad_x))
            run(layers, grads, hidden, *tensors)
        gamma, beta = inputs[3:5]
        return (
            *(grad_x, grads.weight1, grads.bias1, grads.gamma.view_as(gamma)),
            *(grads.beta.view_as(beta), grads.weight2, grad.sum((0, 1)), None),
        )


class _Layers(NamedTuple):
    weight1: Tensor
    bias1: Tensor
    gamma: Tensor
    beta: Tensor
    weight2: Tensor
    bias2: Tensor


@dataclass
class _Gradients:
    """Those of ``_Layers``, to which groups and parts are added one after the other."""

    weight1: Tensor | None
    bias1: Tensor
    gamma: Tensor
    beta: Tensor
    weight2: Tensor | None
    # Those of weights are large, and so nowhere zero before.
    has_weights: bool = False

    @classmethod
    def of(cls, layers: _Layers, needed: Sequence[bool]) -> '_Gradients':
        _, of_weight1, *_, of_weight2, _, _ = needed
        return cls(
            weight1=torch.empty_like(layers.weight1) if of_weight1 else None,
            bias1=torch.zeros_like(layers.bias1),
            gamma=torch.zeros_like(layers.gamma),
            beta=torch.zeros_like(layers.beta),
            weight2=torch.empty_like(layers.weight2) if of_weight2 else None,
        )


def _prepare(x: Tensor, *parameters: Tensor) -> tuple[Tensor, _Layers]:
    """Take all in the order that kernels read, and GRN's as vectors."""
    weight1, bias1, gamma, beta, weight2, bias2 = (p.contiguous() for p in parameters)
    vectors = gamma.flatten(), beta.flatten().to(x.dtype)
    return x.contiguous(), _Layers(weight1, bias1, *vectors, weight2, bias2)


def _fits_at_once(parts: Sequence[slice], x: Tensor, layers: _Layers) -> bool:
    """Tell whether kernels of our own run a group in one call."""
    return len(parts) == 1 and fit(layers.gamma) and fit_products(x, *layers)


def _forward_at_once(
    layers: _Layers, keep: bool, x: Tensor, norms: Tensor, scales: Tensor, out: Tensor
) -> list[Tensor]:
    """Run a group, and return what enters GELU, which is lost unless it is kept."""
    hidden = x.new_empty(*x.shape[:2], len(layers.weight1))
    active = torch.empty_like(hidden) if keep else hidden
    cpu.expand_and_project(layers, EPS, x, (hidden, active, norms, scales, out))
    return [hidden]


def _forward_by_parts(
    parts: Sequence[slice],
    layers: _Layers,
    keep: bool,
    x: Tensor,
    norms: Tensor,
    scales: Tensor,
    out: Tensor,
) -> list[Tensor]:
    hidden = [linear(x[:, part], layers.weight1, layers.bias1) for part in parts]
    pairs = [gelu_squares(h, in_place=not keep) for h in hidden]
    active, squares = zip(*pairs, strict=True)
    norms.copy_(total(squares).sqrt_())
    scales.copy_(scale_of(layers.gamma, norms))
    scale = scales.to(x.dtype)
    for part, a in zip(parts, active, strict=True):
        torch.addcmul(layers.beta, a, scale, out=a)
        linear(a, layers.weight2, layers.bias2, out=out[:, part])
    return hidden


def _backward_at_once(
    layers: _Layers,
    grads: _Gradients,
    hidden: Sequence[Tensor],
    x: Tensor,
    norms: Tensor,
    scales: Tensor,
    grad: Tensor,
    grad_x: Tensor,
) -> None:
    (h,) = hidden
    places = h, norms, scales, grad, torch.empty_like(h), torch.empty_like(h), grad_x
    sums = grads.weight1, grads.bias1, grads.gamma, grads.beta, grads.weight2
    cpu.expand_and_project_backward(layers, EPS, x, places, sums, grads.has_weights)
    grads.has_weights = True


def _backward_by_parts(
    parts: Sequence[slice],
    layers: _Layers,
    grads: _Gradients,
    hidden: Sequence[Tensor],
    x: Tensor,
    norms: Tensor,
    scales: Tensor,
    grad: Tensor,
    grad_x: Tensor,
) -> None:
    weight1, _, gamma, beta, weight2, _ = layers
    grad_hidden = [linear(grad[:, part], weight2.t()) for part in parts]
    sums = total(map(gelu_products, hidden, grad_hidden))
    of_gamma, slope = through_scale(sums[:, :1], gamma, norms)
    grads.gamma += of_gamma
    grads.beta += sums[:, 1].sum(0)
    for part, h, g in zip(parts, hidden, grad_hidden, strict=True):
        a, sums = gelu_backward(h, scales, beta, slope, g)
        grads.bias1 += sums.sum((0, 1))
        linear(g, weight1.t(), out=grad_x[:, part])
        if grads.weight1 is not None:
            add_product(grads.weight1, g, x[:, part], grads.has_weights)
        if grads.weight2 is not None:
            add_product(grads.weight2, grad[:, part], a, grads.has_weights)
        grads.has_weights = True


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


def _divide(x: Tensor, wide: int) -> tuple[list[slice], list[slice]]:
    """Divide pictures into groups, and the positions of each group into parts.

    Several small pictures are one part; a large one is a group of several parts.
    """
    count, positions, _ = x.shape
    groups = _slices(count, _PART // (positions * wide))
    return groups, _slices(positions, _PART // wide)


def _slices(count: int, size: int) -> list[slice]:
    """Cut into equal slices of ``size`` at most, of which the last may be shorter."""
    size = math.ceil(count / math.ceil(count / max(size, 1)))
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
