"""Ways to run the encoder of FCMAE on masked pictures, all with the same weights."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models import ConvNeXtV2
from ..models.grn import GRN
from ..models.layers import Block
from ..models.layouts import DenseLayout, import_minkowski_engine
from .networks import SparKEncoder, build_ours, build_present

# What packed is compared with.
OTHERS = ('dense', 'dense-masked', 'dense-masked-plain', 'minkowski', 'spark')


def build_packed(arch: str) -> ConvNeXtV2:
    """Build the encoder, which runs on visible patches alone.

    Args:
        arch: Its size.

    Returns:
        The encoder.
    """
    return build_ours(arch, out_indices=(-1,), output_norm=False)


def build_others(
    packed: ConvNeXtV2, names: Sequence[str] = OTHERS
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Build what packed is compared with.

    Args:
        packed: The encoder whose weights they get.
        names: Which of them, of :data:`OTHERS`.

    Returns:
        The encoders, and why the others are absent, each by name. They take pictures
        and a mask, and return the features of the last stage in a tuple.
    """
    builders = {
        'dense': (_nothing, lambda: DenseEncoder(packed)),
        'dense-masked': (_nothing, lambda: MaskedEncoder(packed, _block)),
        'dense-masked-plain': (
            _nothing,
            lambda: MaskedEncoder(_with_plain_grn(packed), _plain_block),
        ),
        'minkowski': (import_minkowski_engine, lambda: _minkowski(packed)),
        'spark': (
            partial(import_module, 'mmpretrain.models'),
            lambda: SparKEncoder(packed),
        ),
    }
    return build_present({name: builders[name] for name in names})


def _nothing() -> None:
    """Import what needs nothing else."""


class DenseEncoder(nn.Module):
    """The encoder on whole pictures, whatever the mask.

    Args:
        packed: The encoder whose weights it gets.
    """

    def __init__(self, packed: ConvNeXtV2) -> None:
        super().__init__()
        self.encoder = deepcopy(packed)

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the last map."""
        return self.encoder(image)


class MaskedEncoder(nn.Module):
    """The dense encoder, masked again in every block.

    Args:
        packed: The encoder whose weights it gets.
        block: Runs a block on ``(N, H, W, C)``, given where the picture is seen, and
            the layout.
    """

    def __init__(
        self,
        packed: ConvNeXtV2,
        block: Callable[[Block, Tensor, Tensor, DenseLayout], Tensor],
    ) -> None:
        super().__init__()
        self.encoder = deepcopy(packed)
        self.block = block

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the last map, zero where it is hidden."""
        layout = DenseLayout()
        (conv, norm), *downsamples = self.encoder.downsample_layers
        x = norm(layout.stem(conv, image))
        for i, stage in enumerate(self.encoder.stages):
            if i:
                norm, conv = downsamples[i - 1]
                x = layout.downsample(conv, norm(x))
            side = x.shape[1] // mask.shape[1]
            seen = ~mask.repeat_interleave(side, 1).repeat_interleave(side, 2)
            seen = seen[..., None].to(x.dtype)
            x = _masked(x, seen)
            for block in stage:
                x = self.block(block, x, seen, layout)
        return (x.permute(0, 3, 1, 2),)


def _block(block: Block, x: Tensor, seen: Tensor, layout: DenseLayout) -> Tensor:
    """Run a block by our own kernels.

    With biases at zero, as they start, what is hidden stays zero up to GRN, which does
    not count it then.
    """
    y = block.mlp(_masked(layout.depthwise(block.dwconv, x), seen))
    return _masked(x + y, seen)


def _plain_block(block: Block, x: Tensor, seen: Tensor, layout: DenseLayout) -> Tensor:
    """Run a block by PyTorch's operations alone, as one would write it."""
    conv = block.dwconv
    y = functional.conv2d(
        x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=3, groups=x.shape[-1]
    )
    y = _masked(block.act(block.pwconv1(block.norm(y.permute(0, 2, 3, 1)))), seen)
    return _masked(x + block.pwconv2(block.grn(y)), seen)


def _masked(x: Tensor, seen: Tensor) -> Tensor:
    # GPUs multiply tensors of two types five times as slowly.
    return x * seen.to(x.dtype)


class PlainGRN(GRN):
    """GRN as one would write it in PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, ..., C)``."""
        positions = tuple(range(1, x.dim() - 1))
        norm = torch.linalg.vector_norm(x.float(), dim=positions, keepdim=True)
        response = norm / (norm.mean(-1, keepdim=True) + 1e-6)
        gamma, beta = self.gamma.flatten(), self.beta.flatten()
        return gamma * (x * response.to(x.dtype)) + beta + x


def _with_plain_grn(packed: ConvNeXtV2) -> ConvNeXtV2:
    """Copy the encoder; its blocks run one layer after the other then."""
    encoder = deepcopy(packed)
    for block in encoder.modules():
        if isinstance(block, Block):
            plain = PlainGRN(block.pwconv1.out_features)
            plain.load_state_dict(block.grn.state_dict())
            block.grn = plain
    return encoder


def _minkowski(packed: ConvNeXtV2) -> ConvNeXtV2:
    """Take its convolutions, and PyTorch's layers, as the paper's code does."""
    encoder = _with_plain_grn(packed)
    encoder.sparse = 'minkowski'
    return encoder


def visible(features: Tensor, mask: Tensor) -> Tensor:
    """Return the features of the last stage's visible positions, in one order.

    Args:
        features: Tokens ``(N, V, C)`` or maps ``(N, C, h, w)``.
        mask: ``(N, h, w)``, True where a patch is hidden.

    Returns:
        ``(N * V, C)``.
    """
    if features.dim() == 3:
        return features.flatten(0, 1)
    return features.permute(0, 2, 3, 1)[~mask]
