"""Whether a training run grows: memory, open files and processes, as it goes on.

It trains with the config as tools/train.py does, and prints what the training process
and its loader workers hold at an interval. Growth is what the last quarter of the run
holds, at its median, beyond the second one; the first is left out, in which everything
still warms up, so the first validation should be there. Needs psutil (`pip install
psutil`).
"""

import argparse
from statistics import median
from typing import Any

import psutil
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmcnv2.engine.launch import (
    add_common_arguments,
    build_runner,
    leave_process_group,
    load_config,
)

_COLUMNS = ('main MiB', 'workers MiB', 'files', 'processes')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument(
        '--interval', type=int, default=50, help='iterations from row to row'
    )
    parser.add_argument(
        '--max-growth',
        type=float,
        help='fail if the training process or its workers grow by more MiB than this, '
        'or files or processes grow at all',
    )
    return parser.parse_args()


class GrowthHook(Hook):
    """Take down and print what the process and its loader workers hold."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.rows: list[tuple[float, ...]] = []

    def before_train(self, runner: Runner) -> None:
        self.process = psutil.Process()
        print('| iteration | ' + ' | '.join(_COLUMNS) + ' |')
        print('| --- ' * (len(_COLUMNS) + 1) + '|')

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if not self.every_n_train_iters(runner, self.interval):
            return
        workers = self.process.children(recursive=True)
        everything = [self.process, *workers]
        memory = [each.memory_info().rss / 2**20 for each in everything]
        files = sum(each.num_fds() for each in everything)
        row = (memory[0], sum(memory[1:]), files, len(everything))
        self.rows.append(row)
        print(
            f'| {runner.iter + 1} | ' + ' | '.join(f'{n:.0f}' for n in row) + ' |',
            flush=True,
        )

    def growth(self) -> dict[str, float]:
        """Compare the last quarter with the second one, column by column."""
        quarter = len(self.rows) // 4
        before, after = self.rows[quarter : 2 * quarter], self.rows[-quarter:]
        return {
            name: median(row[i] for row in after) - median(row[i] for row in before)
            for i, name in enumerate(_COLUMNS)
        }


def check(growth: dict[str, float], most: float) -> None:
    """Refuse growth that is more than noise."""
    limits = dict.fromkeys(_COLUMNS[:2], most) | dict.fromkeys(_COLUMNS[2:], 0)
    grown = [name for name in _COLUMNS if growth[name] > limits[name]]
    if grown:
        raise SystemExit(f'It grows: {", ".join(grown)}.')


def main() -> None:
    args = parse_args()
    runner = build_runner(load_config(args))
    hook = GrowthHook(args.interval)
    if is_main_process():
        runner.register_hook(hook, priority='LOWEST')
    runner.train()
    leave_process_group()
    if hook not in runner.hooks:
        return
    if len(hook.rows) < 4:
        raise SystemExit(
            f'{runner.iter} iterations are too few for --interval {args.interval}: '
            'four intervals is the least. Give a shorter one, or train longer.'
        )
    growth = hook.growth()
    print('growth: ' + ', '.join(f'{name} {n:+.1f}' for name, n in growth.items()))
    if args.max_growth is not None:
        check(growth, args.max_growth)


if __name__ == '__main__':
    main()
