"""Starting a backbone from a checkpoint, whichever library wrote it."""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from mmengine.logging import print_log
from mmengine.model import update_init_info
from torch import Tensor

from ..arguments import check_arguments
from ..models.convnextv2 import ConvNeXtV2, has_grn
from ..registry import WEIGHT_INITIALIZERS
from .conversion import Weights, convert_weights, find_format, load_weights

_STEM = 'downsample_layers.0.0.weight'
_SCALE = re.compile(r'stages\.\d\.\d+\.gamma').fullmatch


@WEIGHT_INITIALIZERS.register_module()
@check_arguments
class PretrainedBackbone:
    """What ``init_cfg=dict(type='Pretrained', ...)`` of a backbone does.

    It takes checkpoints in any of :data:`mmcnv2.engine.conversion.FORMATS`, and tells
    in a line what it has loaded.

    Args:
        checkpoint (str): Path or URL.
        prefix (str, optional): How the names of the backbone begin, as in MMEngine.
            Needed only where the checkpoint holds several; 'backbone.' is right for
            any that holds one.
        adapt_stem (bool): Fit the first layer to pictures of another number of
            channels, as timm does: the weights of one channel are the sum of all, those
            of several repeat the checkpoint's in turn and keep the sum of their scale.
            Defaults to False, and then another number of channels is an error.
        adapt_grn (bool): Put GRN into blocks that were trained without, or take it out
            of those trained with it, as in the paper's table 2(f). Nothing else of what
            the blocks compute changes: new GRN is the identity and new LayerScale is
            one, and LayerScale that goes is multiplied into the layer before it.
            Defaults to False, and then other blocks are an error.
        map_location (str): Device to load to. Defaults to 'cpu'.
    """

    def __init__(
        self,
        checkpoint: str,
        prefix: str | None = None,
        adapt_stem: bool = False,
        adapt_grn: bool = False,
        map_location: str = 'cpu',
    ) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.map_location = map_location
        self.adapt_stem = adapt_stem
        self.adapt_grn = adapt_grn

    def __call__(self, module: ConvNeXtV2) -> None:
        """Load.

        Args:
            module (ConvNeXtV2): The backbone.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            ImportError: It is of safetensors, which is not installed.
            RuntimeError: It is no checkpoint, or loading it could run code.
            ValueError: It holds no ConvNeXt V2, or one of another size or with other
                blocks, or one for pictures of other channels.
        """
        weights = load_weights(self.checkpoint, self.map_location)
        try:
            source, weights = _backbone(weights, self.prefix)
            if self.adapt_stem and _STEM in weights:
                weights[_STEM] = _adapt_stem(weights[_STEM], module.in_channels)
            new = _adapt_grn(weights, module) if self.adapt_grn else {}
            weights = {**weights, **new}
            missing, unexpected = module.load_state_dict(weights, strict=False)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f'Cannot start a backbone from {self.checkpoint}: {error}'
            ) from None
        print_log(
            f'Backbone from {self.checkpoint} (in the format {source!r}): '
            f'{len(weights) - len(new) - len(unexpected)} tensors loaded, missing: '
            f'{_listed(missing)}, unexpected: {_listed(unexpected)}',
            logger='current',
        )
        if hasattr(module, '_params_init_info'):
            update_init_info(module, f'Loaded from {self.checkpoint}')


def _backbone(weights: Weights, prefix: str | None) -> tuple[str, Weights]:
    """Return the format, and the weights of the backbone by our names."""
    if prefix:
        weights = _below(weights, prefix.removesuffix('.') + '.')
    # A backbone by itself, and not the official model, whose last norm has no number.
    if _STEM in weights and 'norm.weight' not in weights:
        weights = {f'backbone.{name}': value for name, value in weights.items()}
    source = find_format(weights)
    if source != 'ours':
        weights = convert_weights(weights, 'ours', source).weights
    return source, _below(weights, 'backbone.')


def _below(weights: Weights, prefix: str) -> Weights:
    """Return what is below a prefix; of one backbone alone, all of it."""
    below = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    if not below and prefix != 'backbone.':
        modules = ', '.join({name.split('.')[0]: None for name in weights})
        raise ValueError(f"no name begins with '{prefix}', but with {modules}")
    return below or weights


def _adapt_stem(weight: Tensor, channels: int) -> Tensor:
    weight, known = weight.float(), weight.shape[1]
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight.repeat(1, math.ceil(channels / known), 1, 1)[:, :channels]
    return repeated * (known / channels)


def _adapt_grn(weights: Weights, backbone: ConvNeXtV2) -> Weights:
    """Fit the blocks of a checkpoint, in place; return what they lack."""
    if has_grn(weights) == backbone.use_grn:
        return {}
    adapt = _put_grn_in if backbone.use_grn else _take_grn_out
    return adapt(weights, dict(backbone.named_parameters()))


def _put_grn_in(weights: Weights, ours: Mapping[str, Tensor]) -> Weights:
    scales = {name: weights.pop(name) for name in [*weights] if _SCALE(name)}
    for name in [name for name in weights if '.pwconv2.' in name]:
        scale = scales.get(f'{name.split(".pwconv2.")[0]}.gamma', torch.ones(1))
        weights[name] = torch.einsum('o...,o->o...', weights[name], scale)
    new = {name: torch.zeros(p.shape) for name, p in ours.items() if '.grn.' in name}
    print_log(
        f'GRN is new: {len(new)} tensors, the identity at first. LayerScale, '
        f'{len(scales)} tensors, is multiplied into pwconv2',
        logger='current',
    )
    return new


def _take_grn_out(weights: Weights, ours: Mapping[str, Tensor]) -> Weights:
    gone = [weights.pop(name) for name in [*weights] if '.grn.' in name]
    new = {name: torch.ones(p.shape) for name, p in ours.items() if _SCALE(name)}
    print_log(
        f'GRN is left out: {len(gone)} tensors. LayerScale is new: {len(new)} tensors, '
        'one at first',
        logger='current',
    )
    return new


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names) or 'none'
