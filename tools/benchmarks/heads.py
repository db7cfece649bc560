"""Time and memory of Mask R-CNN and UperNet, by the library that the backbone is of.

All have the same weights in the same heads; that they compute the same is checked. A
step of training is forward, backward and the optimizer's, with labels drawn at random.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

# First, since it explains what may be wrong with the packages that follow.
import mmcnv2  # noqa: F401

# isort: split
import torch
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import Tensor, nn

from mmcnv2.benchmarks.networks import build_ours, other_backbones
from mmcnv2.benchmarks.timing import (
    Contender,
    add_arguments,
    add_size,
    autocast,
    check_agreement,
    difference,
    measure,
    report,
)
from mmcnv2.models import ARCHITECTURES

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / '_base_' / 'models'
# Their scopes, and the sides of a picture.
MODELS_OF = {
    'mask-rcnn': ('mmdet', (800, 1216)),
    'upernet': ('mmseg', (512, 512)),
}
# Pictures of a step; UperNet's norms cannot be trained on a single one.
MODES = dict(training=2, inference=1)
OBJECTS = 10
COLUMNS = {
    'model': '{model}',
    'mode': '{mode}',
    'backbone': '{backbone}',
    's (min, max)': '{seconds:.3f} ({fastest:.3f}, {slowest:.3f})',
    'x ours': '{times_ours:.2f}',
    'MiB': '{peak_mib:.0f}',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, batch_size=None, rounds=5)
    add_size(
        parser,
        '800 1216 for Mask R-CNN and 512 for UperNet if left out, and --batch-size is '
        '2 in training and 1 at inference',
    )
    parser.add_argument(
        '--models', choices=MODELS_OF, nargs='+', default=list(MODELS_OF)
    )
    parser.add_argument('--modes', choices=MODES, nargs='+', default=list(MODES))
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='settings that override those of the model, as key=value, such as '
        'test_cfg.rcnn.max_per_img=20; they need a single one in --models',
    )
    args = parser.parse_args()
    if args.dtype == 'bfloat16' and 'mask-rcnn' in args.models:
        parser.error("MMCV's NMS knows no bfloat16: give --models upernet")
    if args.cfg_options and len(args.models) > 1:
        parser.error('--cfg-options are for a single model: name it in --models')
    return args


class PlainMaps(nn.Module):
    """A backbone whose maps are in plain memory order, as RoIAlign reads them."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.contiguous() for each in self.backbone(pictures))


def build_mask_rcnn(args: argparse.Namespace) -> nn.Module:
    dims = list(ARCHITECTURES[args.arch]['dims'])
    cfg = Config.fromfile(CONFIGS / 'mask-rcnn_convnextv2-tiny_fpn.py')
    cfg.merge_from_dict({'model.neck.in_channels': dims})
    model = build(cfg, args)
    # Without training it would find nothing, and leave the mask head without work.
    model.roi_head.bbox_head.fc_cls.bias.data[0] = 5
    return model


def build_upernet(args: argparse.Namespace) -> nn.Module:
    dims = list(ARCHITECTURES[args.arch]['dims'])
    cfg = Config.fromfile(CONFIGS / 'upernet_convnextv2-tiny.py')
    cfg.merge_from_dict(
        {
            'model.decode_head.in_channels': dims,
            'model.auxiliary_head.in_channels': dims[2],
            # Pictures of one size need no padding, but it asks for something.
            'model.data_preprocessor.size_divisor': 1,
        }
    )
    return revert_sync_batchnorm(build(cfg, args))


def build(cfg: Config, args: argparse.Namespace) -> nn.Module:
    given = {f'model.{key}': value for key, value in args.cfg_options.items()}
    cfg.merge_from_dict({'model.backbone.arch': args.arch} | given)
    return MODELS.build(cfg.model)


BUILDERS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
    'mask-rcnn': build_mask_rcnn,
    'upernet': build_upernet,
}


def draw_batch(
    name: str, mode: str, model: nn.Module, args: argparse.Namespace
) -> dict:
    """Draw pictures and labels, as a data loader gives them."""
    height, width = args.size or MODELS_OF[name][1]
    count = args.batch_size or MODES[mode]
    if name == 'mask-rcnn':
        from mmdet.testing import demo_mm_inputs

        shapes = [(3, height, width)] * count
        objects = [OBJECTS] * count
        return demo_mm_inputs(count, shapes, objects, num_classes=80, with_mask=True)
    from mmseg.structures import SegDataSample

    pictures = torch.randint(256, (count, 3, height, width), dtype=torch.uint8)
    labels = torch.randint(model.decode_head.num_classes, (count, 1, height, width))
    shape = dict(img_shape=(height, width), ori_shape=(height, width))
    samples = [
        SegDataSample(gt_sem_seg=PixelData(data=each), metainfo=shape)
        for each in labels
    ]
    return dict(inputs=list(pictures), data_samples=samples)


def contender(
    name: str, mode: str, library: str, model: nn.Module, args: argparse.Namespace
) -> Contender:
    model = deepcopy(model).train(mode == 'training')
    # At a rate of zero the weights, and so the work, stay as they are.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    torch.manual_seed(0)
    batch = draw_batch(name, mode, model, args)
    data = model.data_preprocessor(batch, training=mode == 'training')

    def train() -> None:
        with autocast(args.device, args.dtype):
            losses = model(**data, mode='loss')
        loss, _ = model.parse_losses(losses)
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def infer() -> None:
        with autocast(args.device, args.dtype):
            model(**data, mode='predict')

    step = train if mode == 'training' else infer
    return Contender(dict(model=name, mode=mode, backbone=library), step, model)


@torch.no_grad()
def raw_outputs(model: nn.Module, args: argparse.Namespace) -> list[Tensor]:
    """Return what comes before anything is chosen from: scores, boxes, or logits."""
    pictures = torch.ones(1, 3, 96, 128, device=args.device).cumsum(2).sin()
    with autocast(args.device, args.dtype):
        maps = model.eval().extract_feat(pictures)
        if hasattr(model, 'rpn_head'):
            scores, boxes = model.rpn_head(maps)
            return [*scores, *boxes]
        return [model.decode_head(maps)]


def with_each_backbone(
    name: str, backbones: dict[str, nn.Module], args: argparse.Namespace
) -> dict[str, nn.Module]:
    """Build the model once, and put the backbones into copies of it."""
    init_default_scope(MODELS_OF[name][0])
    base = BUILDERS[name](args)
    models = {}
    for library, backbone in backbones.items():
        models[library] = deepcopy(base)
        models[library].backbone = PlainMaps(backbone)
        models[library].to(args.device)
    return models


def differences(
    models: dict[str, nn.Module], args: argparse.Namespace
) -> dict[str, float]:
    """Compare all with ours."""
    expected = raw_outputs(models['ours'], args)
    apart = {}
    for library, model in models.items():
        pairs = zip(raw_outputs(model, args), expected, strict=True)
        apart[library] = max(difference(*pair) for pair in pairs)
        check_agreement(library, apart[library], args.dtype)
    return apart


def rows_of(contenders: list[Contender], apart: dict[str, float]) -> list[dict]:
    ours = contenders[0]
    return [
        each.row()
        | dict(times_ours=each.times(ours), difference=apart[each.what['backbone']])
        for each in contenders
    ]


def main() -> None:
    args = parse_args()
    ours = build_ours(args.arch)
    others, absent = other_backbones(ours)
    backbones = {'ours': ours} | others
    rows = []
    for name in args.models:
        models = with_each_backbone(name, backbones, args)
        apart = differences(models, args)
        for mode in args.modes:
            contenders = [
                contender(name, mode, library, model, args)
                for library, model in models.items()
            ]
            measure(contenders, args.rounds, args.device)
            rows += rows_of(contenders, apart)
    report(args, rows, COLUMNS, absent)


if __name__ == '__main__':
    main()
