"""Learning rates that fall with depth, and weight decay where the paper has it."""

import math
from collections.abc import Sequence

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..models import ConvNeXtV2
from ..registry import OPTIM_WRAPPER_CONSTRUCTORS

DECAY_TYPES = ('layer_wise', 'block_wise', 'stage_wise')


def num_layer_groups(depths: Sequence[int], decay_type: str = 'layer_wise') -> int:
    """Return the highest group of a backbone; all else of a model is one above it.

    The stem is group 0, the first two stages are 1 and 2, the third stage makes a
    group of every three blocks, and the last stage is the last group: 6 for 'tiny'
    and 12 for 'base', as in the official code. With 'block_wise' each block is one.

    Args:
        depths (Sequence[int]): Blocks of each of the four stages.
        decay_type (str): As in :func:`layer_group`. Defaults to 'layer_wise'.

    Returns:
        int: Number of the last group. By 'stage_wise' it is that of 'layer_wise' too,
        as in the official code, although stages end at 4.
    """
    if decay_type == 'block_wise':
        return sum(depths)
    return 3 + math.ceil(depths[2] / 3)


def layer_group(name: str, depths: Sequence[int], decay_type: str) -> int:
    """Return the group of a backbone's parameter.

    Args:
        name (str): The parameter's name below the backbone, such as
            ``stages.2.5.pwconv1.weight``.
        depths (Sequence[int]): Blocks of each of the four stages.
        decay_type (str): 'layer_wise', the groups of the official fine-tuning code
            (``optim_factory.py``, 'group' there); 'block_wise', its 'single': each
            block a group, from 1, with the downsampling layer before it; or
            'stage_wise', the groups of the official segmentation code: all
            downsampling layers 0, stage ``i`` ``i + 1``.

    Returns:
        int: The group, from 0 (the stem) upwards, or from 1 by 'block_wise'.
    """
    last = num_layer_groups(depths, decay_type)
    kind, *numbers = name.split('.')
    if kind not in ('downsample_layers', 'stages'):
        return last + 1
    stage = int(numbers[0])
    if decay_type == 'stage_wise':
        return stage + 1 if kind == 'stages' else 0
    if decay_type == 'block_wise':
        block = int(numbers[1]) if kind == 'stages' else 0
        return sum(depths[:stage]) + block + 1
    if stage == 3:
        return last
    if kind == 'downsample_layers':
        return stage + 1 if stage else 0
    if stage == 2:
        return 3 + int(numbers[1]) // 3
    return stage + 1


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Build an optimizer with layer-wise learning rates for a ConvNeXt V2 model.

    A parameter of group ``g`` gets ``lr * decay_rate ** (G - g)``, where ``G`` is the
    group of everything outside the backbone (see :func:`layer_group`). Biases, 1-D
    parameters and every ``gamma`` and ``beta``, hence GRN's, are not decayed.

    Args:
        optim_wrapper_cfg (dict): The optimizer wrapper, MMEngine's.
        paramwise_cfg (dict): ``decay_rate`` (float, in (0, 1]; 1 keeps one learning
            rate) and ``decay_type`` ('layer_wise', the default, 'block_wise' or
            'stage_wise'). ``num_layers``, which configs for other constructors carry,
            may stand there if it is right; it follows from the backbone's depths.

    Raises:
        ValueError: If ``paramwise_cfg`` is anything else, or the model has no
            :class:`ConvNeXtV2`.

    Example:
        >>> optim_wrapper = dict(
        ...     constructor='mmcnv2.LayerDecayOptimWrapperConstructor',
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     paramwise_cfg=dict(decay_rate=0.95),
        ... )
    """

    def _validate_cfg(self) -> None:
        cfg = self.paramwise_cfg
        unknown = set(cfg) - {'decay_rate', 'decay_type', 'num_layers'}
        if unknown or 'decay_rate' not in cfg:
            raise ValueError(
                "paramwise_cfg holds 'decay_rate' and, if wanted, 'decay_type', but "
                f'got {dict(cfg)}'
            )
        for name in ('lr', 'weight_decay'):
            if name not in self.optimizer_cfg:
                raise ValueError(f'the optimizer needs {name}; give it in the config')
        rate = cfg['decay_rate']
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(f'decay_rate is {rate!r}; give a number in (0, 1]')
        if cfg.get('decay_type', 'layer_wise') not in DECAY_TYPES:
            raise ValueError(
                f"unknown decay_type '{cfg['decay_type']}'; choose one of {DECAY_TYPES}"
            )

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Sort a model's trainable parameters into groups.

        Args:
            params (list[dict]): Where the groups are put.
            module (nn.Module): The model.
        """
        rate = self.paramwise_cfg['decay_rate']
        layers, top = self._layers(module)
        groups: dict[tuple[int, bool], dict] = {}
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            layer = layers.get(param, top)
            decays = _decays(name, param)
            scale = rate ** (top - layer)
            group = groups.setdefault(
                (layer, decays),
                dict(
                    params=[],
                    name=f'layer_{layer}_{"decay" if decays else "no_decay"}',
                    lr=self.base_lr * scale,
                    lr_scale=scale,
                    weight_decay=self.base_wd if decays else 0.0,
                ),
            )
            group['params'].append(param)
        params.extend(groups[key] for key in sorted(groups))
        print_log(_describe(params), logger='current')

    def _layers(self, model: nn.Module) -> tuple[dict[nn.Parameter, int], int]:
        """Return the group of each backbone parameter, and the one of all others.

        Backbones of different depths are aligned at their last stages.
        """
        backbones = [m for m in model.modules() if isinstance(m, ConvNeXtV2)]
        if not backbones:
            raise ValueError(
                f'{type(self).__name__} needs a model with a ConvNeXtV2 backbone, but '
                f'{type(model).__name__} has none; use another constructor'
            )
        decay_type = self.paramwise_cfg.get('decay_type', 'layer_wise')
        counts = {b: num_layer_groups(b.depths, decay_type) for b in backbones}
        last = max(counts.values())
        if self.paramwise_cfg.get('num_layers', last) != last:
            raise ValueError(
                f'num_layers is {self.paramwise_cfg["num_layers"]}, but the depths of '
                f'the backbone make {last} groups; leave num_layers out'
            )
        layers = {
            param: layer_group(name, backbone.depths, decay_type) + last - count
            for backbone, count in counts.items()
            for name, param in backbone.named_parameters()
        }
        return layers, last + 1


def _decays(name: str, param: nn.Parameter) -> bool:
    return param.dim() > 1 and not name.endswith(('.bias', '.gamma', '.beta'))


def _describe(groups: list[dict]) -> str:
    """Return a table of the groups."""
    rows = ['Parameter groups:']
    rows.append(
        f'{"name":<20}{"lr":>12}{"lr scale":>10}{"weight decay":>14}{"size":>14}'
    )
    for group in groups:
        size = sum(param.numel() for param in group['params'])
        rows.append(
            f'{group["name"]:<20}{group["lr"]:>12.4g}{group["lr_scale"]:>10.4f}'
            f'{group["weight_decay"]:>14g}{size:>14,}'
        )
    return '\n'.join(rows)
