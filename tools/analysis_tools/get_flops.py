"""Count the parameters of a model, and its multiply-adds for one picture.

A model runs up to the raw outputs of its heads and is counted by MMEngine. A second
stage sees all the regions that model.test_cfg.rpn lets through. What a part computes by
other methods than its forward is counted in the sum alone. FCMAE runs on its visible
patches and is counted by PyTorch, since MMEngine does not see the convolutions there.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

# First, since it explains what may be wrong with the packages that follow.
import mmcnv2  # noqa: F401

# isort: split
import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmcnv2.engine.launch import add_config_arguments, read_config
from mmcnv2.models import FCMAE

# MMSegmentation's mode 'tensor' does not run them.
NEED_SAMPLES = ('MaskFormerHead', 'Mask2FormerHead')


class Count(NamedTuple):
    """Multiply-adds by part ('' is the whole model) and by what computes them."""

    by_part: Mapping[str, int]
    by_operator: Mapping[str, int]
    left_out: str


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        default=[224],
        metavar='SIDE',
        help='height and width of the picture, or one side of a square (default: 224)',
    )
    args = parser.parse_args()
    if len(args.shape) > 2:
        parser.error(f'--shape takes one or two sides, not {len(args.shape)}')
    return args


class FromPictures(nn.Module):
    """A model that needs nothing but pictures, as the analysis runs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Any:
        names = ('ori_shape', 'img_shape', 'pad_shape', 'batch_input_shape')
        shape = tuple(map(int, pictures.shape[2:]))
        sample = BaseDataElement(metainfo=dict.fromkeys(names, shape))
        if type(getattr(self.model, 'decode_head', None)).__name__ in NEED_SAMPLES:
            return self.model.encode_decode(pictures, [sample.metainfo])
        return self.model(pictures, [sample])


def build_model(cfg: Config) -> nn.Module:
    init_default_scope(cfg.get('default_scope', 'mmcnv2'))
    return MODELS.build(cfg.model).eval()


def count(model: nn.Module, pictures: Tensor) -> Count:
    analysis = FlopAnalyzer(FromPictures(model), (pictures,))
    # They are printed below.
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_module = analysis.by_module()
    return Count(
        {'': by_module['']} | {n: by_module[f'model.{n}'] for n in parts(model)},
        analysis.by_operator(),
        ', '.join(
            f'{re.sub("aten::|prim::PythonOp.", "", name)} ({n})'
            for name, n in analysis.unsupported_ops().items()
        ),
    )


def count_packed(model: FCMAE, pictures: Tensor) -> Count:
    if model.backbone.sparse != 'packed':
        raise SystemExit(
            'What MinkowskiEngine computes is not counted. Count the same model '
            'without it: --cfg-options model.backbone.sparse=packed.'
        )
    with FlopCounterMode(display=False) as counter:
        model(pictures)
    # PyTorch counts a multiply-add as two.
    found = {
        module: {op.__name__: flops // 2 for op, flops in ops.items()}
        for module, ops in counter.get_flop_counts().items()
    }
    whole = type(model).__name__
    by_part = {name: sum(found[f'{whole}.{name}'].values()) for name in parts(model)}
    by_operator = found['Global']
    return Count(
        {'': sum(by_operator.values()), **by_part},
        by_operator,
        'norms and all else that goes element by element',
    )


def parts(model: nn.Module) -> list[str]:
    """Name the parts of a model that have parameters."""
    return [name for name, part in model.named_children() if num_parameters(part)]


def num_parameters(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def report(model: nn.Module, counted: Count) -> None:
    print(f'{"":20}{"parameters":>12}{"multiply-adds":>16}')
    for name in [*parts(model), '']:
        params = f'{num_parameters(model.get_submodule(name)) / 1e6:.4g} M'
        adds = f'{counted.by_part.get(name, 0) / 1e9:.4g} G'
        print(f'{name or "all":20}{params:>12}{adds:>16}')
    shares = (f'{name} {n / 1e9:.4g} G' for name, n in counted.by_operator.items())
    print(f'\nCounted, each multiply-add as one: {", ".join(shares)}.')
    print(f'Not counted: {counted.left_out}.')


@torch.no_grad()
def main() -> None:
    args = parse_args()
    cfg = read_config(args)
    model = build_model(cfg)
    height, width = args.shape[0], args.shape[-1]
    pictures = torch.rand(1, cfg.model.backbone.get('in_channels', 3), height, width)
    what = f'One picture of {height} x {width} pixels'
    if isinstance(model, FCMAE):
        print(f'{what}, {model.mask_ratio:.0%} of it hidden:\n')
        report(model, count_packed(model, pictures))
    else:
        print(f'{what}:\n')
        report(model, count(model, pictures))


if __name__ == '__main__':
    main()
