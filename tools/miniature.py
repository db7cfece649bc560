"""The paper in miniature: what GRN and masked pre-training bring, together and alone.

Backbones with blocks of ConvNeXt (V1, LayerScale) and of ConvNeXt V2 (GRN) are
pre-trained by FCMAE and fine-tuned with one budget, from these weights and from random
ones. As in the paper's table 2(f), GRN is also removed, or added anew, in between.

Writes results.md, results.csv, diversity/ and reconstructions/. Started again, it goes
on where it was: runs that have ended are not repeated, others begin anew.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

# First, since it explains what may be wrong with the packages that follow.
import mmcnv2  # noqa: F401

# isort: split
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import find_latest_checkpoint

from mmcnv2.engine.conversion import load_weights, save_weights
from mmcnv2.engine.jobs import start_tool, stop_tool
from mmcnv2.registry import MODELS

TOOLS = Path(__file__).resolve().parent
BLOCKS = ('V1', 'V2')
# By task, the columns of the table: what MMEngine calls a score, and its unit.
SCORES = {
    'segmentation': {'mIoU': ('mIoU', 1)},
    'detection': {'box AP': ('coco/bbox_mAP', 100), 'mask AP': ('coco/segm_mAP', 100)},
}


class Variant(NamedTuple):
    """What block is fine-tuned, and what block was pre-trained, if any."""

    block: str
    pretrained: str | None = None

    def __str__(self) -> str:
        if self.pretrained in (None, self.block):
            return f'{self.block}-{"pretrained" if self.pretrained else "random"}'
        return f'{self.block}-pretrained-as-{self.pretrained}'


COMPARED = tuple(Variant(block, start) for block in BLOCKS for start in (None, block))
TABLE_2F = (Variant('V1', 'V2'), Variant('V2', 'V1'))
REMARKS = dict(zip(TABLE_2F, (', GRN removed', ', GRN added'), strict=True))


class Run(NamedTuple):
    """One of our tools at work.

    Attributes:
        folder: What it writes is here, and nothing else.
        command: The tool and its arguments.
    """

    folder: Path
    command: tuple[str, ...]

    @property
    def end(self) -> Path:
        """The file that tells that it has ended well."""
        return self.folder / 'ended'

    @property
    def log(self) -> Path:
        return self.folder / 'log.txt'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--out-dir',
        type=Path,
        default=Path('work_dirs', 'miniature'),
        help='where all of it goes (default: %(default)s)',
    )
    parser.add_argument(
        '--configs',
        type=Path,
        default=TOOLS.parent / 'configs' / 'demo' / 'miniature',
        help='folder of the recipes pretraining.py, segmentation.py and detection.py '
        '(default: configs/demo/miniature)',
    )
    parser.add_argument(
        '--seeds',
        type=int,
        nargs='+',
        default=[0, 1, 2],
        help='of fine-tuning (default: 0 1 2)',
    )
    parser.add_argument(
        '--tasks',
        nargs='+',
        choices=SCORES,
        default=list(SCORES),
        help='to compare the blocks in (default: both)',
    )
    parser.add_argument(
        '--table-2f',
        nargs='*',
        choices=SCORES,
        default=['segmentation'],
        help='tasks to remove and add GRN in (default: segmentation); none if nothing '
        'is named',
    )
    parser.add_argument(
        '--processes',
        type=int,
        default=2,
        help='runs at a time, each with one thread (default: 2)',
    )
    return parser.parse_args()


def check_recipes(args: argparse.Namespace) -> None:
    """Keep runs of other recipes out of the table."""
    recipes = {
        name: Config.fromfile(args.configs / f'{name}.py').to_dict()
        for name in ('pretraining', *SCORES)
    }
    path, text = args.out_dir / 'recipes.json', json.dumps(recipes, indent=1)
    if path.exists() and path.read_text() != text:
        raise SystemExit(
            f'{args.out_dir} holds runs of other recipes than those in {args.configs}. '
            'Take another --out-dir, or delete it.'
        )
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def train(folder: Path, config: Path, block: str, *options: str) -> Run:
    blocks = f'model.backbone.use_grn={block == "V2"}'
    tool = (str(TOOLS / 'train.py'), str(config), '--work-dir', str(folder))
    return Run(folder, (*tool, '--cfg-options', blocks, *options))


def pretraining(args: argparse.Namespace, block: str) -> Run:
    folder = args.out_dir / 'pretraining' / block
    return train(folder, args.configs / 'pretraining.py', block)


def backbone(args: argparse.Namespace, variant: Variant) -> Path:
    return args.out_dir / 'backbones' / f'{variant}.pth'


def finetuning(args: argparse.Namespace, task: str, variant: Variant, seed: int) -> Run:
    folder = args.out_dir / task / str(variant) / f'seed{seed}'
    options = [f'randomness.seed={seed}']
    if variant.pretrained:
        start = backbone(args, Variant(variant.pretrained, variant.pretrained))
        settings = dict(type='Pretrained', checkpoint=start, adapt_grn=True)
        options += [f'model.backbone.init_cfg.{k}={v}' for k, v in settings.items()]
    return train(folder, args.configs / f'{task}.py', variant.block, *options)


def finetunings(
    args: argparse.Namespace,
) -> dict[Run, tuple[str, Variant, int]]:
    """Return all of them, those that matter most first."""
    groups = ((args.tasks, COMPARED), (args.table_2f, TABLE_2F))
    return {
        finetuning(args, task, variant, seed): (task, variant, seed)
        for tasks, variants in groups
        for seed in args.seeds
        for task in tasks
        for variant in variants
    }


def checkpoint(args: argparse.Namespace, block: str) -> str:
    return find_latest_checkpoint(str(pretraining(args, block).folder))


def save_backbones(args: argparse.Namespace, cfg: Config) -> list[Path]:
    """Store the backbones that fine-tuning starts from, pre-trained and random ones."""
    for variant in COMPARED:
        if variant.pretrained:
            weights = load_weights(checkpoint(args, variant.block))
        else:
            weights = random_weights(cfg, variant.block)
        weights = {k: v for k, v in weights.items() if k.startswith('backbone.')}
        save_weights(weights, backbone(args, variant), 'state_dict')
    return [backbone(args, variant) for variant in COMPARED]


def random_weights(cfg: Config, block: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = MODELS.build({**cfg.model.backbone, 'use_grn': block == 'V2'})
    model.init_weights()
    return {f'backbone.{name}': value for name, value in model.state_dict().items()}


def diversity(args: argparse.Namespace, backbones: list[Path], pictures: Path) -> Run:
    folder = args.out_dir / 'diversity'
    tool = TOOLS / 'analysis_tools' / 'feature_diversity.py'
    what = (tool, args.configs / 'pretraining.py', *backbones, '--input', pictures)
    # What enters GRN, where the paper saw most of the collapse.
    where = ('--measure', 'stages.*.*.act', '--out-dir', folder)
    return Run(folder, tuple(map(str, (*what, *where))))


def reconstructions(args: argparse.Namespace, block: str, pictures: Path) -> Run:
    folder = args.out_dir / 'reconstructions' / block
    trained = pretraining(args, block).folder
    # The config is stored there as it was trained.
    model = (trained / 'pretraining.py', checkpoint(args, block))
    command = (TOOLS / 'reconstruct.py', *model, pictures, '--out-dir', folder)
    return Run(folder, tuple(map(str, command)))


def run_all(
    runs: Sequence[Run], processes: int, then: Callable[[], None] | None = None
) -> None:
    """Run what has not ended yet, some at a time, and do something after each."""
    waiting = deque(run for run in runs if not run.end.exists())
    running: dict[Run, BaseProcess] = {}
    begin = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                run = waiting.popleft()
                running[run] = start(run)
            wait(job.sentinel for job in running.values())
            for run in [run for run, job in running.items() if not job.is_alive()]:
                finish(run, running.pop(run))
                minutes = (time.monotonic() - begin) / 60
                print(
                    f'{minutes:5.1f} min  {run.folder}, '
                    f'{len(waiting) + len(running)} more',
                    flush=True,
                )
                then() if then else None
    finally:
        for job in running.values():
            stop_tool(job)
        for job in running.values():
            job.join()


def start(run: Run) -> BaseProcess:
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    return start_tool(run.command, run.log)


def finish(run: Run, job: BaseProcess) -> None:
    if job.exitcode:
        last = '\n'.join(run.log.read_text().splitlines()[-5:])
        raise SystemExit(
            f'{run.folder.name} failed with status {job.exitcode}:\n{last}\n'
            f'All of it is in {run.log}. The other runs are stopped; the same command '
            'goes on from here.'
        )
    run.end.touch()


def scores(run: Run, task: str) -> dict[str, float]:
    """Return the scores of the last validation, by the columns of the table."""
    (path,) = run.folder.glob('*/vis_data/scalars.json')
    last = json.loads(path.read_text().splitlines()[-1])
    return {name: last[key] * unit for name, (key, unit) in SCORES[task].items()}


def write_results(args: argparse.Namespace) -> None:
    """Write what is there by now."""
    rows = [
        (variant, name, seed, value)
        for run, (task, variant, seed) in finetunings(args).items()
        if run.end.exists()
        for name, value in scores(run, task).items()
    ]
    with (args.out_dir / 'results.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(('pretrained', 'finetuned', 'score', 'seed', 'value'))
        for variant, *row in rows:
            writer.writerow((variant.pretrained or 'no', variant.block, *row))
    (args.out_dir / 'results.md').write_text(table(rows))


def table(rows: Sequence[tuple[Variant, str, int, float]]) -> str:
    """Give mean, standard deviation and values of each score, in Markdown."""
    values: dict[tuple[Variant, str], list[float]] = {}
    for variant, name, _, value in rows:
        values.setdefault((variant, name), []).append(value)
    names = list(dict.fromkeys(name for _, name in values))
    lines = [('pre-trained', 'fine-tuned', *names), ('---',) * (2 + len(names))]
    for variant in dict.fromkeys(variant for variant, _ in values):
        cells = [summary(values.get((variant, name), [])) for name in names]
        block = variant.block + REMARKS.get(variant, '')
        lines.append((variant.pretrained or 'no', block, *cells))
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def summary(values: Sequence[float]) -> str:
    if not values:
        return ''
    each = ', '.join(f'{value:.1f}' for value in values)
    spread = f' ± {stdev(values):.1f}' if len(values) > 1 else ''
    return f'{mean(values):.1f}{spread} ({each})'


def main() -> None:
    args = parse_args()
    args.out_dir = args.out_dir.resolve()
    # Several runs with a thread each are quicker than one with several.
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    # So that runs are stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    check_recipes(args)
    cfg = Config.fromfile(args.configs / 'pretraining.py')
    init_default_scope('mmcnv2')
    # MMEngine would tell of each parameter how it starts.
    MMLogger.get_instance('miniature', log_level='WARNING')

    dataset = cfg.test_dataloader.dataset
    pictures = Path(dataset.data_root, dataset.data_prefix.img_path)

    run_all([pretraining(args, block) for block in BLOCKS], args.processes)
    backbones = save_backbones(args, cfg)
    shown = [reconstructions(args, block, pictures) for block in BLOCKS]
    shown.append(diversity(args, backbones, pictures))
    runs = [*shown, *finetunings(args)]
    run_all(runs, args.processes, then=lambda: write_results(args))
    write_results(args)
    print((args.out_dir / 'results.md').read_text())
    print(f'Files are in {args.out_dir}.')


if __name__ == '__main__':
    main()
