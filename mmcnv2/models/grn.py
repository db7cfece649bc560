"""Global response normalisation, by itself and together with the layers beside it."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_EPS = 1e-6
# Numbers of which a core's cache holds a few times as many.
_PART = 1 << 16


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
        gamma, beta = self.gamma.flatten(), self.beta.flatten()
        return _GRNFunction.apply(x.flatten(1, -2), gamma, beta).view_as(x)


def is_quicker_folded(x: Tensor) -> bool:
    """Tell whether :func:`activate_and_project` is the quick way.

    It is on CPUs, where positions are not much fewer than channels. In 16 bits the sums
    over positions that it hands on could overflow.

    Args:
        x (Tensor): Features, ``(N, ..., C)``.

    Returns:
        bool: Whether it is. Never while a model is traced or compiled.
    """
    exact = x.dtype in (torch.float32, torch.float64)
    wide = 2 * x.shape[1:-1].numel() >= x.shape[-1]
    return not _is_traced() and x.device.type == 'cpu' and exact and wide


def activate_and_project(x: Tensor, grn: GRN, linear: nn.Linear) -> Tensor:
    """Compute ``linear(grn(gelu(x)))`` without ever writing what GRN returns.

    Within a picture GRN scales and shifts each channel, as the weights of the linear
    layer might as well. All that is kept for the backward pass is ``x``.

    Args:
        x (Tensor): Features, ``(N, ..., C)``.
        grn (GRN): GRN of ``C`` channels.
        linear (nn.Linear): From ``C`` channels to ``D``.

    Returns:
        Tensor: ``(N, ..., D)``.
    """
    out = _FoldedProjection.apply(
        x.flatten(1, -2),
        grn.gamma.flatten(),
        grn.beta.flatten(),
        linear.weight,
        linear.bias,
    )
    return out.unflatten(1, x.shape[1:-1])


class _GRNFunction(torch.autograd.Function):
    """GRN of ``(N, P, C)`` with every sum over positions in float32.

    In 16 bits the sum of squares overflows long before the features do, and so does
    autograd's own sum for the gradient of the norm.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        norm, mean = _statistics(x)
        scale = gamma * (norm / mean) + 1
        ctx.save_for_backward(x, gamma, beta, norm, mean)
        return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x, gamma, beta, norm, mean = ctx.saved_tensors
        grad_scale = _sum_of_products(grad, x, norm.dtype)
        grad_gamma, slope = _through_scale(grad_scale, gamma, norm, mean)
        grad_x = grad * (gamma * (norm / mean) + 1) + x * slope
        grad_beta = grad.sum((0, 1), dtype=norm.dtype)
        return grad_x.to(x.dtype), grad_gamma.to(gamma.dtype), grad_beta.to(beta.dtype)


class _FoldedProjection(torch.autograd.Function):
    """GELU, GRN and a linear layer of ``(N, P, C)``, GRN folded into the latter."""

    @staticmethod
    def forward(ctx, x, gamma, beta, weight, bias) -> Tensor:
        activated = functional.gelu(x)
        norm, mean = _statistics(activated)
        ctx.save_for_backward(x, gamma, beta, weight, norm, mean)
        scaled = weight * (gamma * (norm / mean) + 1)
        return torch.baddbmm(weight @ beta + bias, activated, scaled.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x, gamma, beta, weight, norm, mean = ctx.saved_tensors
        activated = functional.gelu(x)
        scale = gamma * (norm / mean) + 1
        grad_bias = grad.sum((0, 1))
        # Of the weights of each picture, which also have all that reaches the scale.
        grad_scaled = grad.mT @ activated
        grad_weight = (grad_scaled * scale).sum(0) + grad_bias[:, None] * beta
        grad_scale = (grad_scaled * weight).sum(dim=1, keepdim=True)
        grad_gamma, slope = _through_scale(grad_scale, gamma, norm, mean)
        grad_activated = torch.baddbmm(activated * slope, grad, weight * scale)
        grad_x = torch.ops.aten.gelu_backward(grad_activated, x)
        return grad_x, grad_gamma, grad_bias @ weight, grad_weight, grad_bias


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms ``(N, 1, C)`` over positions, and their means."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == 'cpu' and not _is_traced():
        norm = _sum_of_products(x, x, dtype).sqrt_()
    else:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)
    return norm, norm.mean(dim=-1, keepdim=True) + _EPS


def _sum_of_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over positions, ``(N, 1, C)``, by parts whose products stay in the cache.

    On CPUs this takes a third to a twentieth of the time of PyTorch's vector_norm, and
    of the memory of its sums.
    """
    rows = max(_PART * a.shape[1] // a.numel(), 1)
    parts = zip(a.split(rows, dim=1), b.split(rows, dim=1), strict=True)
    return sum((x.to(dtype) * y).sum(1, keepdim=True) for x, y in parts)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _through_scale(
    grad: Tensor, gamma: Tensor, norm: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Go from the gradient of the scale to those of gamma and of the features.

    The latter is a multiple of the features, by channel, which is returned.
    """
    response = norm / mean
    grad_gamma = (grad * response).sum((0, 1))
    # Each channel's own norm, and the mean of all.
    grad_response = grad * gamma
    through_mean = (grad_response * response).mean(dim=-1, keepdim=True)
    grad_norm = (grad_response - through_mean) / mean
    return grad_gamma, torch.where(norm > 0, grad_norm / norm, 0)
