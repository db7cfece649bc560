"""How diverse features are: over depth (figure 4 of the paper) and to look at (3)."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

_CHANNELS = 64
_COLUMNS = 8
_GAP = 2
_NARROWEST = 56
_COLOURS = 'RdBu_r'
_HIDDEN = (0.6, 0.6, 0.6)


def diversity_plot(
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]],
) -> Figure:
    """Plot the feature distance against the depth of the layer.

    Args:
        lines: Depths and distances, by the name of each line.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(7, 4.5), dpi=150, layout='constrained')
    axes = figure.subplots()
    for name, (depths, distances) in lines.items():
        axes.plot(depths, distances, marker='o', markersize=3, label=name)
    axes.set_xlabel('depth in blocks')
    axes.set_ylabel('feature distance')
    # From zero up, with room above the highest line.
    axes.update_datalim([(1, 0)])
    axes.autoscale_view()
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def unpack_tokens(tokens: Tensor, mask: Tensor) -> Tensor:
    """Put the visible positions of a picture where they are in it.

    Args:
        tokens: Features of the visible positions, (T, C), by patch, row and column.
        mask: (h, w), True where a patch is hidden.

    Returns:
        Features (H, W, C), not a number where the picture is hidden.
    """
    tiles = tokens.unflatten(0, (int((~mask).sum()), -1))
    side = math.isqrt(tiles.shape[1])
    maps = tokens.new_full((*mask.shape, *tiles.shape[1:]), math.nan)
    maps[~mask] = tiles
    return maps.unflatten(2, (side, side)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def channel_grid(maps: Tensor) -> np.ndarray:
    """Lay out the first 64 channel maps of a picture in rows of eight.

    All maps share one scale, so that a dead map looks dead: white is zero, red is
    positive and blue is negative. The strongest colours stand for the 99th percentile
    of the magnitudes and more. What is not a number is grey.

    Args:
        maps: (H, W, C), of any real type.

    Returns:
        RGB picture (height, width, 3) of type uint8. Maps narrower than 56 pixels are
        enlarged by a whole number, pixel by pixel.
    """
    shown = maps[..., :_CHANNELS].float().cpu().numpy()
    magnitudes = np.abs(shown[np.isfinite(shown)])
    limit = np.percentile(magnitudes, 99) if magnitudes.any() else 1.0
    colours = matplotlib.colormaps[_COLOURS].with_extremes(bad=_HIDDEN)
    # A percentile may be zero where a few magnitudes are not.
    cells = colours(np.ma.masked_invalid(shown / (limit or magnitudes.max()) / 2 + 0.5))
    cells = (cells[..., :3] * 255).round().astype(np.uint8)
    zoom = -(-_NARROWEST // cells.shape[1])
    cells = cells.repeat(zoom, 0).repeat(zoom, 1)

    height, width, count = cells.shape[:3]
    rows, columns = -(-count // _COLUMNS), min(count, _COLUMNS)
    shape = (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3)
    page = np.zeros(shape, np.uint8)
    for channel in range(count):
        row, column = divmod(channel, _COLUMNS)
        top, left = _GAP + row * (height + _GAP), _GAP + column * (width + _GAP)
        page[top : top + height, left : left + width] = cells[:, :, channel]
    return page
