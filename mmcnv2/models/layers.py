"""The block of ConvNeXt V2 and its parts, on channels-last tensors ``(N, ..., C)``."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .depthwise import DepthwiseConv2d
from .layouts import Layout

# How weights start, unless a config says otherwise; GRN starts as the identity.
INIT_CFG = dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0)


class _GRNFunction(torch.autograd.Function):
    """GRN with every sum over positions, forward and backward, in float32.

    In 16 bits the sum of squares overflows long before the features do, and so does
    autograd's own sum for the gradient of the norm.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=_positions(x), keepdim=True, dtype=dtype)
        mean = norm.mean(dim=-1, keepdim=True) + eps
        scale = gamma * (norm / mean) + 1
        ctx.save_for_backward(x, gamma, beta, norm, mean)
        return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, gamma, beta, norm, mean = ctx.saved_tensors
        positions = _positions(x)
        response = norm / mean
        grad_scale = (grad.to(norm.dtype) * x).sum(dim=positions, keepdim=True)
        grad_gamma = (grad_scale * response).flatten(0, -2).sum(0).to(gamma.dtype)
        grad_beta = grad.flatten(0, -2).sum(0, dtype=norm.dtype).to(beta.dtype)

        # Through the norms: each channel's own, and their mean.
        grad_response = grad_scale * gamma
        through_mean = (grad_response * response).mean(dim=-1, keepdim=True)
        grad_norm = (grad_response - through_mean) / mean
        slope = torch.where(norm > 0, grad_norm / norm, 0)
        grad_x = grad * (gamma * response + 1) + x * slope
        return grad_x.to(x.dtype), grad_gamma, grad_beta, None


def _positions(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.dim() - 1))


class GRN(nn.Module):
    """Global response normalisation (ConvNeXt V2, section 4, algorithm 1).

    Each channel is weighted by its L2 norm over the positions of its own picture,
    relative to the mean of the channels' norms.

    Args:
        dim (int): Number of channels.
        eps (float): Added to the mean norm before dividing. Defaults to 1e-6.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
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
        return _GRNFunction.apply(x, gamma, beta, self.eps)


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch per picture.

    Args:
        drop_prob (float): Probability of dropping, in [0, 1).
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Zero each picture's ``(...)`` at random and rescale the others."""
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        kept = x.new_empty(x.shape[:1] + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * kept.div_(keep)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3f}'


class Block(nn.Module):
    """ConvNeXt V2 block: 7x7 depthwise, norm, expand, GELU, GRN, project, residual.

    Args:
        dim (int): Number of channels.
        drop_path (float): Probability of dropping the residual branch of a picture.
            Defaults to 0.
    """

    def __init__(self, dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv2d(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Run the block.

        Args:
            x (Tensor): Features, ``(N, ..., C)``.
            layout (Layout): Where the positions of ``x`` lie in the picture.

        Returns:
            Tensor: Features of the same shape.
        """
        y = self.norm(layout.depthwise(self.dwconv, x))
        y = self.act(self.pwconv1(y))
        y = self.pwconv2(self.grn(y))
        return x + self.drop_path(y)
