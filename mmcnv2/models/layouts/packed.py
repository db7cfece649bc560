"""Visible patches only, by torch operations alone."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..depthwise import DepthwiseConv2d, autocast, depthwise_gradients


class PackedLayout:
    """Run on the visible patches of masked pictures: positions are ``T``, packed.

    Masks are drawn on the grid of the network's total stride, so a visible patch is a
    square tile at every stage (8 x 8, 4 x 4, 2 x 2, 1 x 1 positions), and the stem and
    the downsampling never cross its border. Positions are ordered by patch, then by
    row, then by column: ``T = patches * side * side``. Only the depthwise convolution
    looks beyond a tile. It sees zeros where the picture is hidden, and its values
    there are not kept: a submanifold convolution (ConvNeXt V2, section 3).

    Args:
        mask (Tensor): ``(N, h, w)``, bool, True where a patch is hidden, with equally
            many visible patches in every picture.

    Raises:
        ValueError: If pictures differ in their number of visible patches.
    """

    def __init__(self, mask: Tensor) -> None:
        visible = ~mask
        counts = visible.flatten(1).sum(1)
        if (counts != counts[0]).any():
            raise ValueError(
                'a mask hides equally many patches of each picture, but the numbers '
                f'of visible ones are {counts.tolist()}'
            )
        self.grid = mask.shape
        self.patches = visible.flatten().nonzero().squeeze(1)
        self._rows_by_side: dict[int, Tensor] = {}

    def stem(self, conv: nn.Conv2d, image: Tensor) -> Tensor:
        _, h, w = self.grid
        patches = image.unflatten(3, (w, -1)).unflatten(2, (h, -1))
        # (N * patches, C, patch size, patch size)
        visible = patches.permute(0, 2, 4, 1, 3, 5)[self._places()]
        return self._tokens(conv(visible))

    def depthwise(self, conv: DepthwiseConv2d, x: Tensor) -> Tensor:
        side = self._side(x)
        n, h, w = self.grid
        return _VisibleDepthwise.apply(
            *autocast(x, conv.weight, conv.bias),
            self._rows(side),
            (n, h * side, w * side),
        )

    def downsample(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        side = self._side(x)
        tiles = x.reshape(-1, side, side, x.shape[-1]).permute(0, 3, 1, 2)
        return self._tokens(conv(tiles))

    def output(self, x: Tensor) -> Tensor:
        """Return ``(N, T, C)``."""
        return x

    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Picture, row and column of each visible patch."""
        _, h, w = self.grid
        return self.patches // (h * w), self.patches // w % h, self.patches % w

    def _tokens(self, tiles: Tensor) -> Tensor:
        """Turn ``(N * patches, C, side, side)`` into ``(N, T, C)``."""
        channels = tiles.shape[1]
        return tiles.permute(0, 2, 3, 1).reshape(self.grid[0], -1, channels)

    def _side(self, x: Tensor) -> int:
        """Positions along the side of a tile."""
        return math.isqrt(x.shape[0] * x.shape[1] // len(self.patches))

    def _rows(self, side: int) -> Tensor:
        """Where the rows of the visible tiles lie among the rows of all tiles.

        A row of a tile is contiguous in the picture too, so whole rows are moved. All
        blocks of a stage share the table.
        """
        if side not in self._rows_by_side:
            w = self.grid[2]
            patches = self.patches[:, None]
            lines = patches // w * side + torch.arange(side, device=patches.device)
            self._rows_by_side[side] = (lines * w + patches % w).flatten()
        return self._rows_by_side[side]


class _VisibleDepthwise(torch.autograd.Function):
    """Depthwise convolution of visible tokens in an otherwise empty picture.

    Only the tokens are kept for the backward pass; the picture is filled again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, rows, size):
        ctx.save_for_backward(x, weight, rows)
        ctx.size = size
        picture = _fill(x, rows, size)
        padding = weight.shape[-1] // 2
        out = functional.conv2d(
            picture, weight, bias, padding=padding, groups=len(weight)
        )
        return _pick(out, rows, x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, rows = ctx.saved_tensors
        grad_picture, grad_weight = depthwise_gradients(
            _fill(grad, rows, ctx.size),
            _fill(x, rows, ctx.size),
            weight,
            ctx.needs_input_grad[:2],
        )
        # Of the tokens alone, which is much quicker than oneDNN's of the picture.
        grad_bias = grad.sum((0, 1)) if ctx.needs_input_grad[2] else None
        grad_x = None
        if grad_picture is not None:
            grad_x = _pick(grad_picture, rows, x.shape)
        return grad_x, grad_weight, grad_bias, None, None


def _fill(x: Tensor, rows: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Put tokens ``(N, T, C)`` into empty pictures ``(N, C, H, W)``, channels last."""
    channels = x.shape[-1]
    row = x.numel() // len(rows)
    picture = x.new_zeros(math.prod(size) * channels // row, row)
    picture.index_copy_(0, rows, x.reshape(-1, row))
    return picture.view(*size, channels).permute(0, 3, 1, 2)


def _pick(picture: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Take tokens of ``shape`` out of pictures ``(N, C, H, W)``."""
    row = shape.numel() // len(rows)
    lines = picture.permute(0, 2, 3, 1).reshape(-1, row)
    return lines.index_select(0, rows).view(shape)
