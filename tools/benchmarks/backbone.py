"""Time and memory of the dense backbone, in training and at inference, by library.

All have the same weights and return the maps of the four stages, normalised, as
detectors take them; that they are the same is checked. A step of training is forward
and backward. Each library runs in plain memory order and as channels last, or in the
given --forms, and the quickest counts. Several dtypes are compared as libraries are:
all quotients are of ours in the first.
"""

import argparse
from copy import deepcopy

import torch
from torch import Tensor, nn

from mmcnv2.benchmarks.networks import LIBRARIES, build_ours, other_backbones
from mmcnv2.benchmarks.timing import (
    Contender,
    add_against,
    add_arguments,
    add_size,
    autocast,
    check_agreement,
    difference,
    measure,
    report,
)

# Pictures of a step, and their sides.
MODES = dict(training=(8, (224, 224)), inference=(1, (800, 1216)))
# How the pictures and weights lie in memory.
FORMS = dict(
    plain=torch.contiguous_format,
    channels_last=torch.channels_last,
    compiled=torch.channels_last,
)
COLUMNS = {
    'mode': '{mode}',
    'backbone': '{backbone}',
    'form': '{form}',
    'dtype': '{dtype}',
    's (min, max)': '{seconds:.3f} ({fastest:.3f}, {slowest:.3f})',
    'x ours': '{times_ours:.2f}',
    'counts': '{counts}',
    'MiB': '{peak_mib:.0f}',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, batch_size=None, several_dtypes=True)
    add_size(
        parser,
        'by default 8 pictures of 224 in training, and one of 800 1216 at inference',
    )
    parser.add_argument('--modes', choices=MODES, nargs='+', default=list(MODES))
    parser.add_argument(
        '--forms',
        choices=FORMS,
        nargs='+',
        default=['plain', 'channels_last'],
        help='compiled is channels last, by torch.compile, which takes minutes',
    )
    add_against(parser, LIBRARIES)
    return parser.parse_args()


def draw_pictures(mode: str, args: argparse.Namespace) -> Tensor:
    batch_size, size = MODES[mode]
    shape = (args.batch_size or batch_size, 3, *(args.size or size))
    return torch.randn(shape, device=args.device)


def contender(
    mode: str,
    name: str,
    form: str,
    dtype: str,
    model: nn.Module,
    args: argparse.Namespace,
) -> Contender:
    layout = FORMS[form]
    model = deepcopy(model).to(memory_format=layout)
    model.train(mode == 'training')
    # After training of one size, inference of another would be compiled for any.
    run = torch.compile(model, dynamic=False) if form == 'compiled' else model
    pictures = draw_pictures(mode, args).contiguous(memory_format=layout)

    def train() -> None:
        with autocast(args.device, dtype):
            maps = run(pictures)
        sum(each.float().square().mean() for each in maps).backward()

    @torch.no_grad()
    def infer() -> None:
        with autocast(args.device, dtype):
            run(pictures)

    step = train if mode == 'training' else infer
    what = dict(mode=mode, backbone=name, form=form, dtype=dtype)
    return Contender(what, step, model)


@torch.no_grad()
def differences(
    backbones: dict[str, nn.Module], dtype: str, device: str
) -> dict[str, float]:
    """Compare the maps with ours in float32, on a small picture."""
    picture = torch.randn(1, 3, 96, 128, device=device)
    expected = backbones['ours'](picture)
    apart = {}
    for name, model in backbones.items():
        with autocast(device, dtype):
            found = model(picture)
        apart[name] = max(map(difference, found, expected))
        check_agreement(name, apart[name], dtype)
    return apart


def rows_of(contenders: list[Contender], dtype: str) -> list[dict]:
    best: dict[tuple[str, str], Contender] = {}
    for each in sorted(contenders, key=lambda each: each.row()['seconds']):
        best.setdefault((each.what['backbone'], each.what['dtype']), each)
    return [
        each.row()
        | dict(
            times_ours=each.times(best['ours', dtype]),
            counts='yes' if each in best.values() else '',
        )
        for each in contenders
    ]


def main() -> None:
    args = parse_args()
    ours = build_ours(args.arch)
    others, absent = other_backbones(ours, args.against)
    backbones = {'ours': ours} | others
    backbones = {name: each.to(args.device) for name, each in backbones.items()}
    apart = {dtype: differences(backbones, dtype, args.device) for dtype in args.dtype}

    rows = []
    for mode in args.modes:
        contenders = [
            contender(mode, name, form, dtype, model, args)
            for name, model in backbones.items()
            for form in args.forms
            for dtype in args.dtype
        ]
        measure(contenders, args.rounds, args.device)
        rows += rows_of(contenders, args.dtype[0])
    report(args, rows, COLUMNS, absent, differences=apart)


if __name__ == '__main__':
    main()
