"""The block of ConvNeXt V2 and its parts, on channels-last tensors ``(N, ..., C)``."""

import torch
from torch import Tensor, nn

from .grn import GRN
from .layouts import Layout
from .mlp import expand_and_project, is_quicker_by_parts
from .mlp_on_gpu import is_quicker_as_one, normalise_and_project

# How weights start, unless a config says otherwise; GRN starts as the identity.
INIT_CFG = dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0)


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

    Without GRN it is that of the first ConvNeXt, which has LayerScale instead: a factor
    for each channel, 1e-6 at the start, before the residual is added.

    Args:
        dim (int): Number of channels.
        drop_path (float): Probability of dropping the residual branch of a picture.
            Defaults to 0.
        use_grn (bool): Whether it has GRN, or else LayerScale. Defaults to True.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, use_grn: bool = True) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim) if use_grn else nn.Identity()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        # By its name in the official code of the first version.
        self.gamma = None if use_grn else nn.Parameter(torch.full((dim,), 1e-6))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Run the block.

        Args:
            x (Tensor): Features, ``(N, ..., C)``.
            layout (Layout): Where the positions of ``x`` lie in the picture.

        Returns:
            Tensor: Features of the same shape.
        """
        y = self.mlp(layout.depthwise(self.dwconv, x))
        return x + self.drop_path(y if self.gamma is None else self.gamma * y)

    def mlp(self, y: Tensor) -> Tensor:
        """Normalise, expand, activate, normalise again by GRN, and project.

        Args:
            y (Tensor): Features, ``(N, ..., C)``.

        Returns:
            Tensor: Features of the same shape.
        """
        first, act, grn, second = self.pwconv1, self.act, self.grn, self.pwconv2
        # Others may have been put in their places.
        if not isinstance(grn, GRN):
            return second(grn(act(first(self.norm(y)))))
        if is_quicker_as_one(y, self.norm, first, act, grn, second):
            return normalise_and_project(y, self.norm, first, grn, second)
        y = self.norm(y)
        if is_quicker_by_parts(y, first, act, grn, second):
            return expand_and_project(y, first, grn, second)
        return second(grn(act(first(y))))
