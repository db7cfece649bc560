"""Global response normalisation."""

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor, nn

from .shortcuts import is_traced, is_transformed

EPS = 1e-6
# Elements of a part, of which a CPU's cache holds several; GPUs want few kernels.
_PART, _PART_ELSEWHERE = 1 << 19, 1 << 25


class GRN(nn.Module):
    """Global response normalisation (ConvNeXt V2, section 4, algorithm 1).

    Each channel is weighted by its L2 norm over the positions of its own picture,
    relative to the mean of the channels' norms.

    Args:
        dim (int): Number of channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The shape of the official checkpoints.
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise.

        Args:
            x (Tensor): Features, ``(N, ..., C)``.

        Returns:
            Tensor: ``gamma * (x * N(x)) + beta + x``, shape and dtype of ``x``.
        """
        return normalise(x, self.gamma, self.beta)


def normalise(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Normalise features.

    Args:
        x (Tensor): Features, ``(N, ..., C)``.
        gamma (Tensor): ``(1, 1, 1, C)``.
        beta (Tensor): ``(1, 1, 1, C)``.

    Returns:
        Tensor: ``gamma * (x * N(x)) + beta + x``, shape and dtype of ``x``.
    """
    gamma, beta = gamma.flatten(), beta.flatten()
    # TorchScript cannot save functions of our own, nor ``torch.func`` transform them.
    if torch.jit.is_tracing() or is_transformed():
        return _scale_and_shift(x, scale_of(gamma, _norms(x)), beta)
    return _GRNFunction.apply(x, gamma, beta)


class _GRNFunction(torch.autograd.Function):
    """GRN of ``(N, ..., C)`` with every sum over positions in float32.

    In 16 bits the sum of squares overflows long before the features do, and so does
    autograd's own sum for the gradient of the norm.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        norm = _norms(x)
        scale = scale_of(gamma, norm)
        ctx.save_for_backward(x, gamma, beta, norm, scale)
        return _scale_and_shift(x, scale, beta)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x, gamma, beta, norm, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            # To be differentiated itself, for which what was kept has no graph.
            norm = _root(sum_of_products(x, x))
            scale = scale_of(gamma, norm)
        grad_scale = sum_of_products(grad, x)
        grad_gamma, slope = through_scale(grad_scale, gamma, norm)
        grad_x = grad * scale + x * slope
        grad_beta = grad.sum(tuple(range(grad.dim() - 1)), dtype=norm.dtype)
        return grad_x.to(x.dtype), grad_gamma.to(gamma.dtype), grad_beta.to(beta.dtype)


def _norms(x: Tensor) -> Tensor:
    """Return the norms over positions, with a dimension of 1 for each of theirs."""
    if x.device.type == 'cpu' and not (is_traced() or is_transformed()):
        return sum_of_products(x, x).sqrt_()
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=_positions(x), keepdim=True, dtype=dtype)


def _root(squares: Tensor) -> Tensor:
    """Return the root, which has a slope of 0 where there is nothing."""
    present = squares > 0
    return squares.where(present, 1).sqrt() * present


def _scale_and_shift(x: Tensor, scale: Tensor, beta: Tensor) -> Tensor:
    return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))


def _positions(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.dim() - 1))


def _mean(norm: Tensor) -> Tensor:
    return norm.mean(dim=-1, keepdim=True) + EPS


def scale_of(gamma: Tensor, norm: Tensor) -> Tensor:
    """Scale by each channel's norm in relation to the mean of all (algorithm 1).

    Args:
        gamma (Tensor): ``(C,)``.
        norm (Tensor): The channels' norms, ``(N, ..., C)``, 1 for each position.

    Returns:
        Tensor: What features are multiplied by, of the shape of ``norm``.
    """
    return gamma * (norm / _mean(norm)) + 1


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum over positions in 32 bits at least, by parts whose products a cache holds.

    On CPUs this takes a third to a twentieth of the time of PyTorch's vector_norm, and
    of the memory of its sums. Compilers make one loop of it anyway.

    Args:
        a (Tensor): ``(N, ..., C)``.
        b (Tensor): The same.

    Returns:
        Tensor: ``(N, ..., C)``, 1 for each position.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    if is_traced():
        return (a.to(dtype) * b).sum(_positions(a), keepdim=True)
    elements = _PART if a.device.type == 'cpu' else _PART_ELSEWHERE
    rows = max(elements * a.shape[1] // max(a.numel(), 1), 1)
    parts = zip(a.split(rows, dim=1), b.split(rows, dim=1), strict=True)
    return total((x.to(dtype) * y).sum(_positions(x), keepdim=True) for x, y in parts)


def total(parts: Iterable[Tensor]) -> Tensor:
    """Sum tensors.

    Args:
        parts (Iterable[Tensor]): One at least, of one shape.

    Returns:
        Tensor: The sum; of a single one itself.
    """
    return reduce(torch.add, parts)


def through_scale(grad: Tensor, gamma: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Go from the gradient of the scale to those of gamma and of the features.

    Args:
        grad (Tensor): That of :func:`scale_of`, ``(N, ..., C)``, 1 for each position.
        gamma (Tensor): ``(C,)``.
        norm (Tensor): The channels' norms, as ``grad``.

    Returns:
        tuple[Tensor, Tensor]: The gradient of gamma, ``(C,)``, and so much of
        themselves features add to theirs by way of the scale, as ``grad``.
    """
    mean = _mean(norm)
    of_gamma = grad * (norm / mean)
    # Each channel's own norm, and the mean of all.
    through_mean = (of_gamma * gamma).mean(dim=-1, keepdim=True)
    grad_norm = (grad * gamma - through_mean) / mean
    present = norm > 0
    slope = grad_norm / norm.where(present, 1) * present
    return of_gamma.flatten(0, -2).sum(0), slope
