"""Pictures as tiles: squares of positions, and who lies around each."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

STRIDE = 32  # of the last stage: pixels along the side of a patch
_REACH = 3  # of a kernel of 7 x 7, to each side of its middle
_SIDE = 8  # of the tiles of ordinary pictures


@dataclass(frozen=True)
class Tiles:
    """Where the positions of channels-last features lie in pictures.

    Attributes:
        side (int): Positions along a tile's side: 8, 4, 2 or 1.
        near (Tensor): ``(tiles, W * W)``, int32: the number of each tile around one,
            itself in the middle, or -1 where there is none. ``W`` is odd, and as much
            as a kernel of 7 x 7 reaches.
        origin (Tensor): ``(tiles,)``, int64: the first position of each.
        row (int): Positions in memory from one row of a tile to the next.
        extent (Tensor, optional): ``(tiles, 2)``, int32: rows and columns of each that
            lie within the picture; all of them if it is None.
    """

    SIDES: ClassVar[tuple[int, ...]] = (8, 4, 2, 1)

    side: int
    near: Tensor
    origin: Tensor
    row: int
    extent: Tensor | None = None

    @classmethod
    def of_pictures(cls, count: int, height: int, width: int) -> 'Tiles':
        """Cut ordinary pictures into tiles.

        Args:
            count (int): How many.
            height (int): Of each, in positions, any number.
            width (int): The same.

        Returns:
            Tiles: Of features ``(count, height, width, C)``.
        """
        top = torch.arange(0, height, _SIDE, device='cpu')
        left = torch.arange(0, width, _SIDE, device='cpu')
        picture = torch.arange(count, device='cpu')[:, None, None]
        origin = (picture * height + top[:, None]) * width + left
        sizes = (height - top).clamp(max=_SIDE), (width - left).clamp(max=_SIDE)
        extent = torch.cartesian_prod(*sizes).int().repeat(count, 1)
        return cls(
            side=_SIDE,
            near=_near(origin.shape, torch.arange(origin.numel(), device='cpu'), _SIDE),
            origin=origin.flatten(),
            row=width,
            extent=extent if height % _SIDE or width % _SIDE else None,
        )

    @classmethod
    def of_patches(cls, grid: torch.Size, patches: Tensor, side: int) -> 'Tiles':
        """Take the visible patches of masked pictures, packed one after the other.

        Args:
            grid (torch.Size): ``(N, h, w)``, pictures and the patches along each side.
            patches (Tensor): ``(patches,)``, int64: which of all those are visible, in
                ascending order.
            side (int): Positions along the side of a patch.

        Returns:
            Tiles: Of features ``(N, T, C)``, by patch, row and column.
        """
        near = _near(grid, patches, side)
        origin = torch.arange(len(near), device=near.device) * side**2
        return cls(side, near, origin, row=side)


def _near(shape: torch.Size, present: Tensor, side: int) -> Tensor:
    """Number the tiles that are present of ``(N, h, w)`` and list their neighbours.

    They are given as places among all, so that no shape depends on values.
    """
    reach = -(-_REACH // side)
    count = torch.arange(len(present), dtype=torch.int32, device=present.device)
    numbers = count.new_full(shape, -1).view(-1)
    numbers[present] = count
    padded = pad(numbers.view(shape), [reach] * 4, value=-1)
    width = 2 * reach + 1
    around = padded.unfold(1, width, 1).unfold(2, width, 1)
    return around.flatten(0, 2)[present].flatten(1)
