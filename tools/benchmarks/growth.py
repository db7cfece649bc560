"""How time and memory of the encoder grow, forward and backward, packed and dense.

One thing changes at a time: the side of a picture, the mask ratio, the batch, or the
number of processes, which share the threads and average their gradients. For each the
slope tells how time follows the positions that the encoder computes: the exponent of
the power law that fits best (1 is in proportion), and, of the straight line that fits
best, what does not grow, and how far the times lie off it.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmcnv2.benchmarks.encoders import DenseEncoder, build_packed
from mmcnv2.benchmarks.timing import (
    Contender,
    add_arguments,
    autocast,
    measure,
    report,
    table,
)
from mmcnv2.models.fcmae import draw_mask
from mmcnv2.models.tiles import STRIDE

ENCODERS = ('packed', 'dense')
# The options that hold the values, by what changes.
SERIES = dict(
    size='sizes',
    mask_ratio='mask_ratios',
    batch_size='batch_sizes',
    processes='processes',
)
COLUMNS = {
    'changes': '{changes}',
    'to': '{value:g}',
    'encoder': '{encoder}',
    'patches': '{patches}',
    's (min, max)': '{seconds:.3f} ({fastest:.3f}, {slowest:.3f})',
    'ms a patch': '{ms_per_patch:.2f}',
    'MiB': '{peak_mib:.0f}',
}
SLOPES = {
    'changes': '{changes}',
    'encoder': '{encoder}',
    'exponent of time': '{exponent:.2f}',
    'does not grow, s': '{fixed:.3f}',
    'off the line': '{off_line:.1%}',
    'exponent of memory': '{memory_exponent:.2f}',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, batch_size=2, rounds=5)
    parser.add_argument('--size', type=int, default=224, help='side of a picture')
    parser.add_argument('--mask-ratio', type=float, default=0.6)
    parser.add_argument('--by', choices=SERIES, nargs='+', default=list(SERIES))
    parser.add_argument(
        '--encoders', choices=ENCODERS, nargs='+', default=list(ENCODERS)
    )
    lists: dict[str, tuple[type, list]] = {
        '--sizes': (int, [128, 224, 320, 448, 512, 640, 768, 1024]),
        '--mask-ratios': (float, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        '--batch-sizes': (int, [1, 2, 4, 8, 16]),
        '--processes': (int, [1, 2]),
    }
    for name, (kind, default) in lists.items():
        told = ' '.join(map(str, default))
        parser.add_argument(
            name, type=kind, nargs='+', default=default, help=f'default: {told}'
        )
    parser.add_argument('--plot', type=Path, help='file for a plot, .png or .svg')
    args = parser.parse_args()
    if 'processes' in args.by and torch.device(args.device).type == 'cuda':
        check_gpus(parser, max(args.processes))
    return args


def check_gpus(parser: argparse.ArgumentParser, processes: int) -> None:
    """Refuse more processes than GPUs now, rather than when all else is measured."""
    if processes > (gpus := torch.cuda.device_count()):
        parser.error(
            f'{processes} processes need as many GPUs, and there are {gpus}; give '
            'fewer by --processes, or leave processes out of --by'
        )


def build_encoders(args: argparse.Namespace) -> dict[str, nn.Module]:
    packed = build_packed(args.arch).to(args.device)
    builders = dict(packed=lambda: packed, dense=lambda: DenseEncoder(packed))
    return {name: builders[name]() for name in args.encoders}


def contender(
    name: str, encoder: nn.Module, changes: str, value: float, args: argparse.Namespace
) -> Contender:
    """Set up a point of a series; ``args`` hold what does not change."""
    point = argparse.Namespace(**vars(args) | {changes: value})
    shape = (point.batch_size, 3, point.size, point.size)
    image = torch.randn(shape, device=point.device)
    mask = draw_mask(image, point.mask_ratio)
    computed = (~mask if name == 'packed' else torch.ones_like(mask)).sum().item()

    def step() -> None:
        with autocast(point.device, point.dtype):
            (features,) = encoder(image, mask)
        features.float().square().mean().backward()

    what = dict(changes=changes, value=value, encoder=name, patches=computed)
    return Contender(what, step, encoder)


def in_one_process(changes: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all points of a series in turns."""
    encoders = build_encoders(args)
    contenders = [
        contender(name, encoders[name], changes, value, args)
        for value in getattr(args, SERIES[changes])
        for name in encoders
    ]
    measure(contenders, args.rounds, args.device)
    return [each.row() for each in contenders]


def in_processes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure several processes, each with a whole batch."""
    rows = []
    for count in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            work = (count, torch.get_num_threads(), Path(folder), args)
            mp.spawn(run_process, work, nprocs=count)
            rows += torch.load(Path(folder, 'rows.pt'))
    return rows


def run_process(
    rank: int, count: int, threads: int, folder: Path, args: argparse.Namespace
) -> None:
    """Measure as one of several processes; the first writes what it found."""
    torch.set_num_threads(max(1, threads // count))
    on_gpu = torch.device(args.device).type == 'cuda'
    if on_gpu:
        args.device = f'cuda:{rank}'
        torch.cuda.set_device(rank)
    dist.init_process_group(
        'nccl' if on_gpu else 'gloo',
        init_method=f'file://{folder / "meeting"}',
        rank=rank,
        world_size=count,
    )
    rows = in_this_process(count, args)
    if rank == 0:
        torch.save(rows, folder / 'rows.pt')
    dist.barrier()
    dist.destroy_process_group()


def in_this_process(count: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, and let go of what would wait for the group that ends after this."""
    contenders = [
        contender(name, DistributedDataParallel(encoder), 'processes', count, args)
        for name, encoder in build_encoders(args).items()
    ]
    measure(contenders, args.rounds, args.device)
    rows = [each.row() for each in contenders]
    return [dict(row, patches=row['patches'] * count) for row in rows]


def slope(changes: str, name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fit the growth of a series, if what is computed changes in it."""
    own = [row for row in rows if (row['changes'], row['encoder']) == (changes, name)]
    patches, times, memory = (
        np.array([row[key] for row in own], float)
        for key in ('patches', 'seconds', 'peak_mib')
    )
    if len(set(patches)) < 2:
        return {}
    # Weighed by their size, so that what is fitted is how far they lie off in percent.
    per_patch, fixed = np.polyfit(patches, times, 1, w=1 / times)
    line = per_patch * patches + fixed
    return dict(
        changes=changes,
        encoder=name,
        exponent=float(np.polyfit(np.log(patches), np.log(times), 1)[0]),
        fixed=float(fixed),
        off_line=float(np.abs(times / line - 1).max()),
        memory_exponent=float(np.polyfit(np.log(patches), np.log(memory), 1)[0]),
    )


def plot(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> Figure:
    """Draw time and memory of each series, side by side."""
    figure = Figure(figsize=(6.4, 2.8 * len(args.by)), dpi=150, layout='constrained')
    grid = figure.subplots(len(args.by), 2, squeeze=False)
    kinds = (('seconds', 'seconds'), ('peak_mib', 'MiB'))
    for line, changes in zip(grid, args.by, strict=True):
        for axes, (key, label) in zip(line, kinds, strict=True):
            for name in args.encoders:
                own = [
                    (row['value'], row[key])
                    for row in rows
                    if (row['changes'], row['encoder']) == (changes, name)
                ]
                axes.plot(*zip(*own, strict=True), marker='o', markersize=3, label=name)
            axes.set_ylim(bottom=0)
            axes.set_xlabel(changes.replace('_', ' '))
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
    grid[0, 0].legend()
    return figure


def main() -> None:
    args = parse_args()
    rows = []
    for changes in args.by:
        if changes == 'processes':
            rows += in_processes(args)
        else:
            rows += in_one_process(changes, args)
    for row in rows:
        row['ms_per_patch'] = row['seconds'] / row['patches'] * 1e3
    fits = (slope(changes, name, rows) for changes in args.by for name in args.encoders)
    slopes = [fit for fit in fits if fit]
    report(args, rows, COLUMNS, slopes=slopes)
    print(f'\nA patch has {STRIDE} x {STRIDE} pixels.')
    if slopes:
        print(f'\n{table(slopes, SLOPES)}')
    if args.plot:
        plot(rows, args).savefig(args.plot)


if __name__ == '__main__':
    main()
