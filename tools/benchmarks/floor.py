"""What this machine can do at most, and how long the encoder takes at that rate.

The peak is that of matrix products, of a large square one and of those of the encoder's
pointwise layers, and of copies between arrays that no cache holds. The floor counts the
operations that visible positions need, forward and twice as many backward.
"""

import argparse

import torch
from torch import nn

from mmcnv2.benchmarks.timing import (
    DTYPES,
    Contender,
    add_arguments,
    measure,
    report,
    table,
)
from mmcnv2.models import ARCHITECTURES
from mmcnv2.models.fcmae import count_visible
from mmcnv2.models.linear import linear

COLUMNS = {
    'what': '{what}',
    's (min, max)': '{seconds:.4f} ({fastest:.4f}, {slowest:.4f})',
    'reached': '{rate:.1f} {unit}',
}
FLOORS = {
    'stage': '{stage}',
    'pointwise, GFLOP': '{pointwise:.1f}',
    'depthwise, GFLOP': '{depthwise:.1f}',
    'other, GFLOP': '{other:.1f}',
    'floor, s': '{floor:.4f}',
    "by the stage's own product, s": '{own_floor:.4f}',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, rounds=15)
    parser.add_argument('--size', type=int, default=224, help='side of a picture')
    parser.add_argument('--mask-ratio', type=float, default=0.6)
    parser.add_argument('--side', type=int, default=2048, help='of the large product')
    parser.add_argument('--mib', type=int, default=256, help='how much is copied')
    return parser.parse_args()


def count(args: argparse.Namespace) -> list[dict]:
    """Count the operations of each stage, forward and backward, where it is visible."""
    picture = torch.empty(1, 3, args.size, args.size, device='meta')
    visible = args.batch_size * count_visible(picture, args.mask_ratio)
    arch = ARCHITECTURES[args.arch]
    stages = []
    for i, (depth, dim) in enumerate(zip(arch['depths'], arch['dims'], strict=True)):
        positions = visible * 4 ** (3 - i)
        # A stem of 4 x 4 pixels of 3 channels, then downsampling of 2 x 2 positions.
        inputs = 4 * arch['dims'][i - 1] if i else 16 * 3
        # Two for each multiply-add, and backward twice as many as forward.
        scale = 2 * 3 * positions * dim / 1e9
        stages.append(
            dict(
                stage=i,
                positions=positions,
                dim=dim,
                pointwise=scale * depth * 8 * dim,
                depthwise=scale * depth * 49,
                other=scale * inputs,
            )
        )
    return stages


def product(what: str, rows: int, inner: int, columns: int, args) -> Contender:
    kind = dict(dtype=DTYPES[args.dtype], device=args.device)
    left = torch.randn(rows, inner, **kind)
    weight = torch.randn(columns, inner, **kind)
    shape = f'{what} ({rows} x {inner} by {inner} x {columns})'
    work = dict(what=shape, work=2e-9 * rows * inner * columns, unit='GFLOP/s')
    return Contender(work, lambda: linear(left, weight), nn.Module())


def copy(args: argparse.Namespace) -> Contender:
    source = torch.ones(args.mib * 2**18, device=args.device)
    target = torch.ones_like(source)
    # Each is read or written once.
    what = f'copy of {args.mib} MiB'
    work = dict(what=what, work=2 * args.mib * 2**20 / 1e9, unit='GB/s')
    return Contender(work, lambda: target.copy_(source), nn.Module())


def main() -> None:
    args = parse_args()
    stages = count(args)
    contenders = [
        product('square product', args.side, args.side, args.side, args),
        *(
            product(f'stage {s["stage"]}', s['positions'], s['dim'], 4 * s['dim'], args)
            for s in stages
        ),
        copy(args),
    ]
    measure(contenders, args.rounds, args.device)
    rows = [each.row() for each in contenders]
    for row in rows:
        # A peak is what was reached once.
        row['rate'] = row['work'] / row['fastest']
    for stage, row in zip(stages, rows[1:], strict=False):
        flop = stage['pointwise'] + stage['depthwise'] + stage['other']
        stage['floor'] = flop / rows[0]['rate']
        stage['own_floor'] = flop / row['rate']
    names = [key for key in stages[0] if key not in ('stage', 'positions', 'dim')]
    whole = {name: sum(stage[name] for stage in stages) for name in names}
    floors = [*stages, dict(stage='all', **whole)]
    report(args, rows, COLUMNS, floors=floors)
    print(f'\n{table(floors, FLOORS)}')


if __name__ == '__main__':
    main()
