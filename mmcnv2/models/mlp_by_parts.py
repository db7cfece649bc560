"""Expansion, GELU, GRN and projection of features ``(N, P, C)``, by parts.

The expanded features are several times as wide as the rest. They go through all of this
by parts that a cache holds: several small pictures at a time, or parts of a large one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from .gelu import gelu_backward, gelu_products, gelu_squares
from .grn import EPS, scale_of, through_scale, total
from .kernels import cpu, fit, fit_products
from .linear import add_product, linear

# Expanded features that are dealt with at a time: what a last-level cache holds.
_PART = 1 << 22


def forward(*inputs: Tensor, keep: bool, place: Tensor | None = None) -> list[Tensor]:
    """Compute ``linear(grn(gelu(linear(x))))``.

    Args:
        *inputs (Tensor): Features ``(N, P, C)``, weight ``(D, C)`` and bias of the
            expansion, GRN's gamma and beta, weight ``(C, D)`` and bias of the
            projection.
        keep (bool): Whether there will be a backward pass.
        place (Tensor, optional): Where to put what enters GELU, ``(N, P, D)``.

    Returns:
        list[Tensor]: Features ``(N, P, C)``, GRN's norms and scales, ``(N, 1, D)``,
        and, if it is kept, what enters GELU: in pieces, one for each part of each
        group.
    """
    x, layers = _prepare(*inputs)
    wide = len(layers.weight1)
    groups, parts = _divide(x, wide)
    at_once = _fits_at_once(parts, x, layers)
    run = _forward_at_once if at_once else partial(_forward_by_parts, parts)
    precise = torch.promote_types(x.dtype, torch.float32)
    norms, scales = (x.new_empty(len(x), 1, wide, dtype=precise) for _ in range(2))
    out, kept = torch.empty_like(x), []
    for group in groups:
        tensors = (t[group] for t in (x, norms, scales, out))
        pieces = run(layers, keep, None if place is None else place[group], *tensors)
        kept += pieces if keep else []
    return [out, norms, scales, *kept]


def backward(
    grad: Tensor, *saved: Tensor, needed: tuple[bool, bool] = (True, True)
) -> list[Tensor | None]:
    """Go back.

    Args:
        grad (Tensor): Gradient of the features that came out.
        *saved (Tensor): What went in, and what came out besides, in pieces or in the
            place that was given for them.
        needed (tuple[bool, bool]): Whether gradients of both weights are wanted.
            Defaults to both.

    Returns:
        list[Tensor | None]: Gradients of all that went in but the last bias.
    """
    (*inputs, norms, scales), hidden = saved[:9], saved[9:]
    x, layers = _prepare(*inputs)
    grad = grad.contiguous()
    groups, parts = _divide(x, len(layers.weight1))
    if len(hidden) == 1:
        hidden = tuple(hidden[0][g][:, p] for g in groups for p in parts)
    rest = iter(hidden)
    at_once = _fits_at_once(parts, x, layers)
    run = _backward_at_once if at_once else partial(_backward_by_parts, parts)
    grads = _Gradients.of(layers, *needed)
    grad_x = torch.empty_like(x)
    for group in groups:
        pieces = list(islice(rest, len(parts)))
        tensors = (t[group] for t in (x, norms, scales, grad, grad_x))
        run(layers, grads, pieces, *tensors)
    gamma, beta = inputs[3:5]
    return [
        *(grad_x, grads.weight1, grads.bias1, grads.gamma.view_as(gamma)),
        *(grads.beta.view_as(beta).to(beta.dtype), grads.weight2),
    ]


# As operators of PyTorch, which its compiler calls as they are.


@torch.library.custom_op(
    'mmcnv2::expand_and_project',
    mutates_args=(),
    schema='(Tensor[] inputs, bool keep) -> Tensor[]',
)
def forward_operator(inputs: Sequence[Tensor], keep: bool) -> list[Tensor]:
    """Compute the same; the pieces are one, so that their number hangs on no size."""
    if not keep:
        return forward(*inputs, keep=False)
    x, weight1, *_ = inputs
    hidden = x.new_empty(*x.shape[:2], len(weight1))
    out, norms, scales, *_ = forward(*inputs, keep=True, place=hidden)
    return [out, norms, scales, hidden]


@forward_operator.register_fake
def _(inputs: Sequence[Tensor], keep: bool) -> list[Tensor]:
    x, weight1, *_ = inputs
    count, positions, _ = x.shape
    precise = torch.promote_types(x.dtype, torch.float32)
    sums = (x.new_empty(count, 1, len(weight1), dtype=precise) for _ in range(2))
    hidden = [x.new_empty(count, positions, len(weight1))] if keep else []
    return [x.new_empty(x.shape), *sums, *hidden]


@torch.library.custom_op(
    'mmcnv2::expand_and_project_backward',
    mutates_args=(),
    schema='(Tensor grad, Tensor[] saved) -> Tensor[]',
)
def backward_operator(grad: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
    """Go back from it, to weights that nobody wants gradients of as well."""
    grads = backward(grad, *(each.contiguous() for each in saved))
    return [each for each in grads if each is not None]


@backward_operator.register_fake
def _(grad: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
    return [each.new_empty(each.shape) for each in saved[:6]]


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
    def of(cls, layers: _Layers, of_weight1: bool, of_weight2: bool) -> '_Gradients':
        """Take place for them; those of weights need not be wanted."""
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
    layers: _Layers,
    keep: bool,
    place: Tensor | None,
    x: Tensor,
    norms: Tensor,
    scales: Tensor,
    out: Tensor,
) -> list[Tensor]:
    """Run a group, and return what enters GELU, which is lost unless it is kept."""
    shape = *x.shape[:2], len(layers.weight1)
    hidden = x.new_empty(shape) if place is None else place
    active = torch.empty_like(hidden) if keep else hidden
    cpu.expand_and_project(layers, EPS, x, (hidden, active, norms, scales, out))
    return [hidden]


def _forward_by_parts(
    parts: Sequence[slice],
    layers: _Layers,
    keep: bool,
    place: Tensor | None,
    x: Tensor,
    norms: Tensor,
    scales: Tensor,
    out: Tensor,
) -> list[Tensor]:
    places = [None if place is None else place[:, part] for part in parts]
    expand = partial(linear, weight=layers.weight1, bias=layers.bias1)
    hidden = [expand(x[:, p], out=at) for p, at in zip(parts, places, strict=True)]
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
