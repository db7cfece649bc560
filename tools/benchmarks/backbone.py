"""Time and memory of the dense backbone, in training and at inference, by library.

All have the same weights and return the maps of the four stages, normalised, as
detectors take them; that they are the same is checked. A step of training is forward
and backward. Each library runs in plain memory order and as channels last, and the
quicker one counts.
"""

import argparse
from copy import deepcopy

import torch
from torch import Tensor, nn

from mmcnv2.benchmarks.networks import build_ours, other_backbones
from mmcnv2.benchmarks.timing import (
    Contender,
    add_arguments,
    autocast,
    check_agreement,
    difference,
    measure,
    report,
)

# Pictures of a step, and their sides.
MODES: dict[str, tuple[int, list[int]]] = dict(
    training=(8, [224]), inference=(1, [800, 1216])
)
FORMATS = dict(plain=torch.contiguous_format, channels_last=torch.channels_last)
COLUMNS = {
    'mode': '{mode}',
    'backbone': '{backbone}',
    'memory': '{format}',
    's (min, max)': '{seconds:.3f} ({fastest:.3f}, {slowest:.3f})',
    'x ours': '{times_ours:.2f}',
    'counts': '{counts}',
    'MiB': '{peak_mib:.0f}',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, batch_size=None)
    parser.add_argument(
        '--size',
        type=int,
        nargs='+',
        metavar='SIDE',
        help='height and width of a picture, or one side of a square; by default 8 '
        'pictures of 224 in training, and one of 800 1216 at inference',
    )
    parser.add_argument('--modes', choices=MODES, nargs='+', default=list(MODES))
    return parser.parse_args()


def draw_pictures(mode: str, args: argparse.Namespace) -> Tensor:
    batch_size, size = MODES[mode]
    size = args.size or size
    shape = (args.batch_size or batch_size, 3, size[0], size[-1])
    return torch.randn(shape, device=args.device)


def contender(
    mode: str, name: str, form: str, model: nn.Module, args: argparse.Namespace
) -> Contender:
    layout = FORMATS[form]
    model = deepcopy(model).to(memory_format=layout)
    model.train(mode == 'training')
    pictures = draw_pictures(mode, args).contiguous(memory_format=layout)

    def train() -> None:
        with autocast(args):
            maps = model(pictures)
        sum(each.float().square().mean() for each in maps).backward()

    @torch.no_grad()
    def infer() -> None:
        with autocast(args):
            model(pictures)

    step = train if mode == 'training' else infer
    return Contender(dict(mode=mode, backbone=name, format=form), step, model)


@torch.no_grad()
def differences(
    backbones: dict[str, nn.Module], args: argparse.Namespace
) -> dict[str, float]:
    """Compare the maps with ours, on a small picture."""
    picture = torch.randn(1, 3, 96, 128, device=args.device)
    apart = {}
    for name, model in backbones.items():
        with autocast(args):
            pairs = zip(model(picture), backbones['ours'](picture), strict=True)
            apart[name] = max(difference(*pair) for pair in pairs)
        check_agreement(name, apart[name], args)
    return apart


def rows_of(contenders: list[Contender]) -> list[dict]:
    rows = [each.row() for each in contenders]
    best: dict[str, float] = {}
    for row in rows:
        name = row['backbone']
        best[name] = min(row['seconds'], best.get(name, row['seconds']))
    for row in rows:
        row['times_ours'] = row['seconds'] / best['ours']
        row['counts'] = 'yes' if row['seconds'] == best[row['backbone']] else ''
    return rows


def main() -> None:
    args = parse_args()
    ours = build_ours(args.arch)
    others, absent = other_backbones(ours)
    backbones = {'ours': ours} | others
    backbones = {name: each.to(args.device) for name, each in backbones.items()}
    apart = differences(backbones, args)

    rows = []
    for mode in args.modes:
        contenders = [
            contender(mode, name, form, model, args)
            for name, model in backbones.items()
            for form in FORMATS
        ]
        measure(contenders, args.rounds, args.device)
        rows += rows_of(contenders)
    report(args, rows, COLUMNS, absent, differences=apart)


if __name__ == '__main__':
    main()
