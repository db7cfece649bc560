"""Visible patches only, by MinkowskiEngine's sparse kernels."""

import collections
import collections.abc
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .packed import PackedLayout

_FINEST = 8  # positions along the side of a patch, after the stem


def import_minkowski_engine() -> ModuleType:
    """Import MinkowskiEngine.

    Returns:
        ModuleType: The package.

    Raises:
        ImportError: If it is not installed; the message says how to.
    """
    # MinkowskiEngine 0.5.4 looks for Sequence where Python 3.10 no longer has it.
    absent = not hasattr(collections, 'Sequence')
    if absent:
        collections.Sequence = collections.abc.Sequence
    try:
        import MinkowskiEngine
    except ImportError as error:
        raise ImportError(
            f"sparse='minkowski' needs MinkowskiEngine 0.5.4, but: {error}. Install it "
            'by `bash tools/install_minkowski.sh` in a checkout of mmcnv2, or take '
            "sparse='packed', which gives the same features and needs nothing more"
        ) from error
    finally:
        if absent:
            del collections.Sequence
    return MinkowskiEngine


class MinkowskiLayout(PackedLayout):
    """The packed layout's tokens, with convolutions by MinkowskiEngine.

    This is how the paper's code runs the encoder, and a way of checking the packed
    layout. It is exact, and slower. Weights stay those of the ordinary convolutions;
    they are only seen in MinkowskiEngine's order, where a kernel's rows vary fastest.

    Args:
        mask (Tensor): ``(N, h, w)``, bool, True where a patch is hidden.
        num_visible (int): Patches of each picture that are not.

    Raises:
        ImportError: If MinkowskiEngine is not installed.
        RuntimeError: If it cannot run where the mask is.
    """

    def __init__(self, mask: Tensor, num_visible: int) -> None:
        super().__init__(mask, num_visible)
        self.engine = import_minkowski_engine()
        if mask.is_cuda and not self.engine.is_cuda_available():
            raise RuntimeError(
                'MinkowskiEngine was built for the CPU alone, but the pictures are on '
                f"{mask.device}; take sparse='packed' there"
            )
        device = 'CUDA' if mask.is_cuda else 'CPU'
        self.manager = self.engine.CoordinateManager(
            D=2, coordinate_map_type=getattr(self.engine.CoordinateMapType, device)
        )
        self._maps_by_side: dict[int, tuple[Any, Tensor]] = {}

    def depthwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        module = self._module(
            'MinkowskiChannelwiseConvolution',
            conv.in_channels,
            kernel_size=conv.kernel_size[0],
        )
        kernel = conv.weight.permute(3, 2, 0, 1).flatten(0, 1).squeeze(-1)
        return self._run(module, kernel, conv.bias, x, self._side(x))

    def downsample(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        module = self._module(
            'MinkowskiConvolution',
            conv.in_channels,
            conv.out_channels,
            kernel_size=2,
            stride=2,
        )
        kernel = conv.weight.permute(3, 2, 1, 0).flatten(0, 1)
        return self._run(module, kernel, conv.bias, x, self._side(x) // 2)

    def _module(self, name: str, *channels: int, **geometry: int) -> nn.Module:
        # It draws weights of its own, which nobody uses, from torch's generator.
        with torch.random.fork_rng(devices=[]):
            return getattr(self.engine, name)(*channels, **geometry, dimension=2)

    def _run(
        self,
        module: nn.Module,
        kernel: Tensor,
        bias: Tensor | None,
        x: Tensor,
        side: int,
    ) -> Tensor:
        """Apply a sparse convolution whose output has tiles of ``side`` positions."""
        key, order = self._map(self._side(x))
        out_key, out_order = self._map(side)
        # Its kernels know nothing of autocast and of 16 bits.
        features = x.flatten(0, 1).to(kernel.dtype).index_select(0, order)
        tokens = self.engine.SparseTensor(
            features, coordinate_map_key=key, coordinate_manager=self.manager
        )
        out = functional_call(module, dict(kernel=kernel), (tokens, out_key)).F
        out = out if bias is None else out + bias
        return out.index_select(0, out_order.argsort()).unflatten(0, (len(x), -1))

    def _map(self, side: int) -> tuple[Any, Tensor]:
        """Return a stage's coordinate map, and which token each of its rows is."""
        if side not in self._maps_by_side:
            key, (order, _) = self.manager.insert_and_map(
                self._coordinates(side), _FINEST // side
            )
            self._maps_by_side[side] = key, order.long()
        return self._maps_by_side[side]

    def _coordinates(self, side: int) -> Tensor:
        """Picture, row and column of each token, counted at the finest stage."""
        picture, row, column = (place[:, None, None] for place in self._places())
        line = torch.arange(side, device=picture.device)
        coordinates = torch.broadcast_tensors(
            picture, row * side + line[:, None], column * side + line
        )
        stride = torch.tensor((1, _FINEST // side, _FINEST // side)).to(line)
        return (torch.stack(coordinates, -1).flatten(0, 2) * stride).int()
