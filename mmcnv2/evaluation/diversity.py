"""How much the channels of a layer differ (ConvNeXt V2, section 4).

The paper finds that masked pre-training lets the features of a plain ConvNeXt collapse:
channel maps are dead, saturated or alike. GRN prevents it.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from ..models.layers import Block

NAMES = ('distance', 'dead', 'saturated')
BLOCKS = ('stages.*.*',)
_NEGLIGIBLE = 0.01


@torch.no_grad()
def feature_diversity(features: Tensor) -> Tensor:
    """Measure the channel maps of each picture.

    The distance is the paper's: the mean of ``(1 - cos) / 2`` over all pairs of channel
    maps, each map also with itself. It is 0 where all maps are the same but for a
    positive factor. It is about 0.5 where they have nothing in common, but also where
    they are the same but for signs, as outputs of a block can be, and GELU's hardly.

    A map that is exactly zero has no cosine, so pairs with it do not count; without any
    other map the distance is 0.

    The paper speaks of dead and saturated maps and defines neither. Here a map is dead
    in a picture if its greatest magnitude is at most 1 % of the mean of the greatest
    magnitudes of all channels. It is saturated if it is not dead and about the same
    everywhere: its standard deviation is at most 1 % of its root mean square. A map of
    one position cannot vary, so it is dead or saturated.

    All is computed in float32 at least, and without a matrix of all pairs: the cosines
    add up to the squared norm of the sum of the maps, each of length one.

    Args:
        features: Channels last, (N, ..., C), as inside of the blocks: (N, H, W, C), or
            (N, T, C) for the visible positions of masked pictures. Of any real type.

    Returns:
        Distance, share of dead maps and share of saturated maps of each picture,
        (N, 3).

    Raises:
        ValueError: If there are less than three dimensions.
    """
    if features.dim() < 3:
        raise ValueError(
            f'features of shape (N, ..., C) expected, but got {tuple(features.shape)}; '
            'unsqueeze what is of a single picture'
        )
    # One by one, since training may have left little memory.
    return torch.stack([_measure(picture.flatten(0, -2)) for picture in features])


def _measure(maps: Tensor) -> Tensor:
    """Measure the maps (positions, C) of a picture."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    peak = maps.abs().amax(0)
    has_direction = peak != 0
    # Squares of maps that reach 1 neither overflow nor vanish.
    maps = maps / peak.where(has_direction, 1)
    variance, mean = torch.var_mean(maps, dim=0, correction=0)
    power = variance + mean.square()

    units = maps / (power * len(maps)).sqrt().where(has_direction, 1)
    pairs = has_direction.sum().square()
    cosine = units.sum(1).square().sum() / pairs
    # Rounding may take a cosine above 1.
    distance = ((1 - cosine) / 2).clamp(min=0).where(pairs > 0, 0)

    dead = peak <= _NEGLIGIBLE * peak.mean()
    saturated = ~dead & (variance <= _NEGLIGIBLE**2 * power)
    shares = [share.to(maps.dtype).mean() for share in (dead, saturated)]
    return torch.stack([distance, *shares])


def find_layers(
    backbone: nn.Module, patterns: Sequence[str] = BLOCKS
) -> dict[str, nn.Module]:
    """Find blocks, and layers of blocks, by their names.

    Args:
        backbone: A :class:`~mmcnv2.models.ConvNeXtV2`.
        patterns: Names such as ``stages.2.5``, the sixth block of the third stage, or
            ``stages.2.5.act``, its GELU, whose output is the input of ``grn``. ``*``
            stands for any part between two dots. All blocks by default.

    Returns:
        The modules by their names, in the order of the backbone.

    Raises:
        ValueError: If no layer has the name, or the channels of its output are not the
            last dimension.
    """
    known = dict(_channels_last(backbone))
    wanted = set()
    for pattern in patterns:
        regex = re.compile(re.escape(pattern).replace(r'\*', '[^.]+'))
        matches = {name for name in known if regex.fullmatch(name)}
        if not matches:
            raise ValueError(
                f"no layer to measure is named '{pattern}'; give blocks of a "
                "ConvNeXtV2, such as 'stages.0.0', or their layers (norm, pwconv1, "
                "act, grn, pwconv2, drop_path), such as 'stages.*.*.act'"
            )
        wanted |= matches
    return {name: module for name, module in known.items() if name in wanted}


def _channels_last(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Give each block and its layers, by name, but for the depthwise convolution."""
    for block_name, block in backbone.named_modules():
        if isinstance(block, Block):
            yield block_name, block
            for name, layer in block.named_children():
                if not isinstance(layer, nn.Conv2d):
                    yield f'{block_name}.{name}', layer


class DiversityRecorder:
    """Measure the outputs of layers while a model runs.

    What the model computes stays as it is.

    Args:
        backbone: A :class:`~mmcnv2.models.ConvNeXtV2`.
        layers: What to measure; see :func:`find_layers`. The paper says "each layer";
            by default it is the output of each block, after the residual.
    """

    def __init__(self, backbone: nn.Module, layers: Sequence[str] = BLOCKS) -> None:
        self.layers = find_layers(backbone, layers)
        self._measured: dict[str, list[Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def start(self) -> None:
        """Forget what was measured, and measure from now on."""
        self.stop()
        self._measured = {name: [] for name in self.layers}
        self._handles = [
            layer.register_forward_hook(partial(self._take, name))
            for name, layer in self.layers.items()
        ]

    def stop(self) -> None:
        """Measure no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def result(self) -> dict[str, dict[str, float]]:
        """Average over all pictures of all processes, each of which has to call it.

        Returns:
            For each layer, in the order of the backbone, ``distance``, ``dead`` and
            ``saturated``, as :func:`feature_diversity` has them.

        Raises:
            RuntimeError: If a layer has not run.
        """
        idle = [name for name, found in self._measured.items() if not found]
        if idle or not self._measured:
            raise RuntimeError(
                f'{", ".join(idle or self.layers)} did not run since start(): run the '
                'backbone itself, and not compiled'
            )
        values = [torch.cat(found) for found in self._measured.values()]
        sums = [
            torch.stack([each.sum(0), torch.ones_like(each).sum(0)]) for each in values
        ]
        totals = torch.stack(sums)
        all_reduce(totals)
        means = (totals[:, 0] / totals[:, 1]).tolist()
        return {
            name: dict(zip(NAMES, mean, strict=True))
            for name, mean in zip(self.layers, means, strict=True)
        }

    def _take(self, name: str, layer: nn.Module, args: tuple, output: Tensor) -> None:
        self._measured[name].append(feature_diversity(output))
