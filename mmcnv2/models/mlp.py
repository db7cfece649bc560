"""Expansion, GELU, GRN and projection of a block as one function, by parts."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import mlp_by_parts
from .grn import GRN, normalise
from .shortcuts import (
    autocast,
    dtype_of,
    is_ordinary,
    is_plain,
    is_traced,
    only_takes_pytorch,
)


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
        bool: Whether it is. Never while a model is exported, nor where there are other
        layers than a block was built with, or observed ones.
    """
    dtypes = [torch.float32, torch.float64]
    dtypes += [] if torch.is_grad_enabled() else [torch.bfloat16]
    fits = x.is_cpu and is_ordinary(x) and dtype_of(x) in dtypes and x.numel() > 0
    if not fits or only_takes_pytorch(x):
        return False
    return are_as_built(x.shape[-1], pwconv1, act, grn, pwconv2)


def are_as_built(
    channels: int,
    pwconv1: nn.Module,
    act: nn.Module,
    grn: nn.Module,
    pwconv2: nn.Module,
) -> bool:
    """Tell whether these are the layers that a block was built with, unobserved.

    Args:
        channels (int): Those of the features.
        pwconv1 (nn.Module): What stands in the place of the expansion.
        act (nn.Module): In that of GELU.
        grn (nn.Module): In that of GRN.
        pwconv2 (nn.Module): In that of the projection.

    Returns:
        bool: Whether they are.
    """
    if not is_plain(pwconv1, nn.Linear) or not is_plain(pwconv2, nn.Linear):
        return False
    if not is_plain(act, nn.GELU) or act.approximate != 'none':
        return False
    if not is_plain(grn, GRN) or pwconv1.bias is None or pwconv2.bias is None:
        return False
    # Kernels would not notice; PyTorch's operations tell what is wrong.
    wide = len(pwconv1.weight)
    shapes = [x.shape for x in (pwconv1.weight, pwconv2.weight, pwconv2.bias)]
    sizes = [x.numel() for x in (pwconv1.bias, grn.gamma, grn.beta)]
    fitting = [(wide, channels), (channels, wide), (channels,)]
    return shapes == fitting and sizes == [wide] * 3


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
    inputs = tokens, *first, grn.gamma, grn.beta, *second
    keep = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    return _ExpandAndProject.apply(*inputs, keep).view_as(x)


class _ExpandAndProject(torch.autograd.Function):
    """The same of ``(N, P, C)``."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, gamma, beta, weight2, bias2, keep) -> Tensor:
        inputs = x, weight1, bias1, gamma, beta, weight2, bias2
        if is_traced():
            out, *kept = mlp_by_parts.forward_operator(inputs, keep)
        else:
            out, *kept = mlp_by_parts.forward(*inputs, keep=keep)
        ctx.save_for_backward(*inputs, *kept)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, grad), None
        if is_traced():
            grads = mlp_by_parts.backward_operator(grad, ctx.saved_tensors)
        else:
            _, of_weight1, *_, of_weight2, _, _ = ctx.needs_input_grad
            needed = of_weight1, of_weight2
            grads = mlp_by_parts.backward(grad, *ctx.saved_tensors, needed=needed)
        return *grads, grad.sum((0, 1)), None


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
    """Go back to those inputs that need gradients, which get a graph of their own.

    Args:
        out (Tensor): What was computed of them, by operations with a graph.
        inputs (Sequence[Tensor]): The inputs.
        needed (Sequence[bool]): Whether each needs one.
        grad (Tensor): The gradient of ``out``.

    Returns:
        Iterator[Tensor | None]: A gradient or None for each input.
    """
    wanted = [each for each, needs in zip(inputs, needed, strict=True) if needs]
    grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return (next(grads) if needs else None for needs in needed)
