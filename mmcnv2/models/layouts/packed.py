"""Visible patches only, by torch operations alone."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..depthwise import DepthwiseConv2d, autocast, input_gradient, weight_gradient
from ..shortcuts import is_observed


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
        self._pictures: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
        self._tables: dict[tuple[int, int], Tensor] = {}
        self._lines_by_side: dict[int, Tensor] = {}

    def stem(self, conv: nn.Conv2d, image: Tensor) -> Tensor:
        _, h, w = self.grid
        patches = image.unflatten(3, (w, -1)).unflatten(2, (h, -1))
        # (N * patches, C, patch size, patch size)
        visible = patches.permute(0, 2, 4, 1, 3, 5)[self._places()]
        tokens = self._tokens(conv(visible))
        if tokens.requires_grad:
            # By then no block needs them any more.
            tokens.register_hook(lambda _: self._pictures.clear())
        return tokens

    def depthwise(self, conv: DepthwiseConv2d, x: Tensor) -> Tensor:
        tensors = autocast(x, conv.weight, conv.bias)
        return _VisibleDepthwise.apply(*tensors, self)

    def downsample(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Convolve squares that do not overlap: a product of matrices."""
        side, size = self._side(x), conv.kernel_size[0]
        if is_observed(conv):
            tiles = x.reshape(-1, side, side, x.shape[-1]).permute(0, 3, 1, 2)
            return self._tokens(conv(tiles))
        tiles = x.reshape(-1, side // size, size, side // size, size, x.shape[-1])
        squares = tiles.transpose(2, 3).reshape(len(x), -1, size**2 * x.shape[-1])
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        return functional.linear(squares, weight, conv.bias)

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

    def fill(self, x: Tensor, margin: int, name: str) -> Tensor:
        """Put tokens into pictures that are empty elsewhere, with a margin around them.

        Args:
            x (Tensor): Tokens, ``(N, T, C)``.
            margin (int): Width of the margin.
            name (str): Of the memory to use, which the next call with this name uses
                again.

        Returns:
            Tensor: ``(N, C, H + 2 * margin, W + 2 * margin)``, channels last.
        """
        side, (n, h, w) = self._side(x), self.grid
        size = (n, h * side + 2 * margin, w * side + 2 * margin, x.shape[-1])
        picture = self._empty(name, size, x)
        picture.flatten(0, 2).index_copy_(0, self._table(side, margin), x.flatten(0, 1))
        return picture.permute(0, 3, 1, 2)

    def _empty(self, name: str, size: tuple[int, ...], x: Tensor) -> Tensor:
        """Give a picture that is zero where no token will be put.

        Stages share its memory if it suffices: fresh memory is slower.
        """
        memory, last = self._pictures.get(name, (None, None))
        count = math.prod(size)
        if memory is None or memory.numel() < count or memory.dtype != x.dtype:
            memory = x.new_zeros(count)
        elif last != size:
            memory[:count].zero_()
        self._pictures[name] = memory, size
        return memory[:count].view(size)

    def pick(self, pictures: Tensor, x: Tensor) -> Tensor:
        """Take tokens, as many as in ``x``, out of pictures ``(N, C, H, W)``."""
        # A row of a tile is contiguous in the picture too, so whole rows are moved.
        side = self._side(x)
        lines = pictures.permute(0, 2, 3, 1).reshape(-1, side * x.shape[-1])
        return lines.index_select(0, self._lines(side)).view(x.shape)

    def _lines(self, side: int) -> Tensor:
        """Where the lines of tiles lie among all such lines of the pictures."""
        if side not in self._lines_by_side:
            self._lines_by_side[side] = self._table(side, 0)[::side] // side
        return self._lines_by_side[side]

    def _table(self, side: int, margin: int) -> Tensor:
        """Where tokens lie among the positions of all pictures.

        All blocks of a stage share it.
        """
        if (side, margin) not in self._tables:
            _, h, w = self.grid
            picture, row, column = (p[:, None, None] for p in self._places())
            within = torch.arange(side, device=self.patches.device)
            y = picture * (h * side + 2 * margin) + margin + row * side
            y = y + within[:, None]
            x = margin + column * side + within
            table = y * (w * side + 2 * margin) + x
            self._tables[side, margin] = table.flatten()
        return self._tables[side, margin]


class _VisibleDepthwise(torch.autograd.Function):
    """Depthwise convolution of visible tokens in an otherwise empty picture.

    Only the tokens are kept for the backward pass; the picture is filled again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, layout):
        ctx.save_for_backward(x, weight)
        ctx.layout = layout
        pictures = layout.fill(x, weight.shape[-1] // 2, 'features')
        out = functional.conv2d(pictures, weight, bias, groups=len(weight))
        return layout.pick(out, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x, weight), layout = ctx.saved_tensors, ctx.layout
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        margin = weight.shape[-1] // 2
        grads = layout.fill(grad, 0, 'gradients')
        grad_x = grad_weight = None
        if of_x:
            grad_x = layout.pick(input_gradient(grads, weight, padding=margin), x)
        if of_weight:
            pictures = layout.fill(x, margin, 'features')
            grad_weight = weight_gradient(grads, pictures, weight)
        # Of the tokens alone, which is much quicker than oneDNN's of the picture.
        grad_bias = grad.sum((0, 1)) if of_bias else None
        return grad_x, grad_weight, grad_bias, None
