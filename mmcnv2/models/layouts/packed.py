"""Visible patches only, by kernels of our own or by torch operations alone."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..depthwise import convolve_tiles, is_depthwise, is_quicker_by_tiles
from ..shortcuts import autocast, is_plain, is_traced, is_transformed
from ..tiles import STRIDE, Tiles


class PackedLayout:
    """Run on the visible patches of masked pictures: positions are ``T``, packed.

    Masks are drawn on the grid of the network's total stride, so a visible patch is a
    square tile at every stage (8 x 8, 4 x 4, 2 x 2, 1 x 1 positions), and the stem and
    the downsampling never cross its border. Positions are ordered by patch, then by
    row, then by column: ``T = patches * side * side``. Only the depthwise convolution
    looks beyond a tile. It sees zeros where the picture is hidden, and its values
    there are not kept: a submanifold convolution (ConvNeXt V2, section 3).

    Args:
        mask (Tensor): ``(N, h, w)``, bool, True where a patch is hidden.
        num_visible (int): Patches of each picture that are not.
    """

    def __init__(self, mask: Tensor, num_visible: int) -> None:
        self.grid = mask.shape
        first = torch.arange(len(mask), device=mask.device) * mask.flatten(1).shape[1]
        self.patches = (find_visible(mask, num_visible) + first[:, None]).flatten()
        self._tiles_by_side: dict[int, Tiles] = {}
        self._tables: dict[int, Tensor] = {}
        if is_traced():
            # Within a block with checkpoints nothing could be remembered.
            for side in Tiles.SIDES:
                self._table(side)
                self._tiles(side)

    def stem(self, conv: nn.Conv2d, image: Tensor) -> Tensor:
        _, h, w = self.grid
        patches = image.unflatten(3, (w, -1)).unflatten(2, (h, -1))
        visible = patches.permute(0, 2, 4, 3, 5, 1)[self._places()]
        return self._convolve(conv, visible, STRIDE)

    def depthwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        if is_quicker_by_tiles(conv, x):
            return convolve_tiles(conv, x, self._tiles(self._side(x)))
        recorded = is_traced() or is_transformed()
        if recorded or not is_depthwise(conv, x.shape[-1]):
            return self.pick(conv(self.fill(x)), x)
        return _ConvolveInPictures.apply(*autocast(x, conv), self)

    def downsample(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return self._convolve(conv, x, self._side(x))

    def _convolve(self, conv: nn.Conv2d, x: Tensor, side: int) -> Tensor:
        """Convolve tiles of so many positions along each side, each by itself."""
        channels = x.shape[-1]
        if not _merges_squares(conv):
            tiles = x.reshape(-1, side, side, channels).permute(0, 3, 1, 2)
            out = conv(tiles).permute(0, 2, 3, 1)
            return out.reshape(self.grid[0], -1, out.shape[-1])
        # A product of matrices.
        height, width = conv.kernel_size
        squares = x.reshape(-1, side // height, height, side // width, width, channels)
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        rows = squares.transpose(2, 3).reshape(self.grid[0], -1, weight.shape[1])
        return functional.linear(rows, weight, conv.bias)

    def output(self, x: Tensor) -> Tensor:
        """Return ``(N, T, C)``."""
        return x

    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Picture, row and column of each visible patch."""
        _, h, w = self.grid
        return self.patches // (h * w), self.patches // w % h, self.patches % w

    def _tiles(self, side: int) -> Tiles:
        """How tokens lie at a stage, whose blocks share it."""
        if side not in self._tiles_by_side:
            self._tiles_by_side[side] = Tiles.of_patches(self.grid, self.patches, side)
        return self._tiles_by_side[side]

    def _side(self, x: Tensor) -> int:
        """Positions along the side of a tile."""
        # Tried one after the other, for roots of sizes cannot be compiled.
        tokens, tiles = x.shape[0] * x.shape[1], len(self.patches)
        return next(side for side in Tiles.SIDES if side**2 * tiles == tokens)

    def fill(self, x: Tensor) -> Tensor:
        """Put tokens ``(N, T, C)`` into pictures ``(N, C, H, W)``, empty elsewhere."""
        # A row of a tile is contiguous in the picture too, so whole rows are moved.
        side, (n, h, w) = self._side(x), self.grid
        lines = x.new_zeros(n * h * side * w, side * x.shape[-1])
        lines.index_copy_(0, self._table(side), x.reshape(-1, lines.shape[1]))
        return lines.view(n, h * side, w * side, -1).permute(0, 3, 1, 2)

    def pick(self, pictures: Tensor, x: Tensor) -> Tensor:
        """Take tokens, as many as in ``x``, out of pictures ``(N, C, H, W)``."""
        side = self._side(x)
        lines = pictures.permute(0, 2, 3, 1).reshape(-1, side * x.shape[-1])
        return lines.index_select(0, self._table(side)).view(x.shape)

    def _table(self, side: int) -> Tensor:
        """Where the rows of tiles lie among all such rows of the pictures.

        All blocks of a stage share it.
        """
        if side not in self._tables:
            _, h, w = self.grid
            picture, row, column = (place[:, None] for place in self._places())
            within = torch.arange(side, device=self.patches.device)
            y = (picture * h + row) * side + within
            self._tables[side] = (y * w + column).flatten()
        return self._tables[side]


def find_visible(mask: Tensor, num_visible: int) -> Tensor:
    """Find the visible patches of each picture.

    Args:
        mask (Tensor): ``(N, h, w)``, bool, True where a patch is hidden.
        num_visible (int): Patches of each picture that are not.

    Returns:
        Tensor: ``(N, num_visible)``, int64: their places among the ``h * w`` of the
        picture, in ascending order.
    """
    # Sorted and not searched for, so that no shape depends on the mask's values.
    order = mask.flatten(1).byte().argsort(dim=1, stable=True)
    return order[:, :num_visible]


def _merges_squares(conv: nn.Module) -> bool:
    """Tell whether a convolution is one of squares that do not overlap."""
    if not is_plain(conv, nn.Conv2d):
        return False
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    return geometry == (conv.kernel_size, (0, 0), (1, 1), 1)


class _ConvolveInPictures(torch.autograd.Function):
    """Depthwise convolution of visible tokens in otherwise empty pictures.

    Only the tokens are kept for the backward pass; the pictures are filled again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, layout):
        ctx.save_for_backward(x, weight)
        ctx.layout = layout
        padding, groups = weight.shape[-1] // 2, len(weight)
        pictures = layout.fill(x)
        out = functional.conv2d(pictures, weight, bias, padding=padding, groups=groups)
        return layout.pick(out, x)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), layout = ctx.saved_tensors, ctx.layout
        tensors = layout.fill(grad), layout.fill(x), weight
        ones, margin = [1, 1], [weight.shape[-1] // 2] * 2
        geometry = ones, margin, ones, False, [0, 0], len(weight)
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            *tensors, [len(weight)], *geometry, ctx.needs_input_grad[:3]
        )
        grad_x = None if grad_x is None else layout.pick(grad_x, x)
        return grad_x, grad_weight, grad_bias, None
