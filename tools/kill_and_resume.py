"""Kill training at random moments, resume it, and compare with a run left in peace.

Whatever a resumed run gets, bit by bit: weights, the state of the optimizer, averaged
weights, schedules, and all losses and metrics that were logged. The config should train
within a minute or so, and write checkpoints several times.
"""

import argparse
import importlib
import os
import random
import runpy
import shutil
import sys
import time
from contextlib import suppress
from itertools import takewhile
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import mmcnv2  # noqa: F401

# isort: split
import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from mmcnv2.engine.checkpoint import load_from_local
from mmcnv2.engine.launch import add_config_arguments, read_config

TRAIN = Path(__file__).with_name('train.py')
# What MMEngine says when it begins to train.
BEGINS = 'Checkpoints will be saved to'
# Besides what the message hub logs, which is looked at too.
COMPARED = ('state_dict', 'optimizer', 'ema_state_dict', 'param_schedulers')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('--kills', type=int, default=10, help='how many, 10 by default')
    parser.add_argument('--seed', type=int, default=0, help='of their moments')
    parser.add_argument(
        '--work-dir',
        default='work_dirs/kill_and_resume',
        help='folder for the runs; what is in it is removed',
    )
    return parser.parse_args()


def import_library(scope: str) -> None:
    """Import here what takes each run seconds to import; runs are forks of this one."""
    for part in ('datasets', 'engine', 'evaluation', 'models', 'visualization'):
        with suppress(ModuleNotFoundError):
            importlib.import_module(f'{scope}.{part}')


def settings_of(args: argparse.Namespace) -> list[str]:
    """Read on in what was typed after ``--cfg-options``, and name a seed."""
    cfg = read_config(args)
    import_library(cfg.get('default_scope', 'mmengine'))
    given = sys.argv[sys.argv.index('--cfg-options') + 1 :] if args.cfg_options else []
    given = [*takewhile(lambda each: not each.startswith('--'), given)]
    seed = (cfg.get('randomness') or {}).get('seed')
    return given if seed is not None else [*given, 'randomness.seed=0']


def start(work_dir: Path, config: str, settings: list[str]) -> BaseProcess:
    """Start training, or resume it."""
    work_dir.mkdir(parents=True, exist_ok=True)
    argv = [str(TRAIN), config, '--work-dir', str(work_dir), '--resume']
    argv += ['--cfg-options', *settings] if settings else []
    process = get_context('fork').Process(target=train, args=(argv, work_dir / 'log'))
    process.start()
    return process


def train(argv: list[str], log: Path) -> None:
    with open(log, 'a') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = argv
    runpy.run_path(argv[0], run_name='__main__')


def await_training(process: BaseProcess, log: Path, begun: int) -> None:
    """Wait until the log says once more that training begins."""
    while process.is_alive() and read(log).count(BEGINS) <= begun:
        time.sleep(0.01)


def read(log: Path) -> str:
    return log.read_text() if log.exists() else ''


def check_end(process: BaseProcess, log: Path) -> None:
    if process.exitcode:
        last = '\n'.join(read(log).splitlines()[-20:])
        raise SystemExit(f'Training failed ({log}):\n{last}')


def outcome(work_dir: Path) -> dict[str, Any]:
    """Read what a run has come to."""
    last = Path(work_dir, 'last_checkpoint').read_text()
    checkpoint = load_from_local(last, 'cpu')
    scalars = checkpoint['message_hub']['log_scalars'].items()
    logged = {k: v for k, v in scalars if not k.endswith(('time', 'memory'))}
    done = {key: checkpoint['meta'][key] for key in ('epoch', 'iter')}
    return flatten({k: checkpoint.get(k) for k in COMPARED} | done | logged)


def flatten(value: Any, name: str = '') -> dict[str, Any]:
    """Give each number of a nest a name."""
    if isinstance(value, HistoryBuffer):
        value = value.data[0]
    if isinstance(value, dict):
        value = value.items()
    elif isinstance(value, (list, tuple)):
        value = enumerate(value)
    else:
        return {name: value}
    parts = [flatten(each, f'{name}/{key}') for key, each in value]
    return {key: each for part in parts for key, each in part.items()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """List the names of what is not the same to the last bit."""
    missing = one.keys() ^ other.keys()
    common = [name for name in one if name in other]
    return sorted(missing) + [n for n in common if not same(one[n], other[n])]


def same(one: Any, other: Any) -> bool:
    one, other = (x.numpy() if isinstance(x, torch.Tensor) else x for x in (one, other))
    return np.array_equal(one, other, equal_nan=np.asarray(one).dtype.kind == 'f')


def compare(expected: dict[str, Any], work_dir: Path) -> None:
    different = differences(expected, outcome(work_dir))
    if different:
        raise SystemExit(
            f'{work_dir} came to something else: {len(different)} of {len(expected)} '
            f'values differ, the first: {", ".join(different[:5])}'
        )
    print(f'the same: {len(expected)} weights, states and logs, bit by bit')


def kill_and_resume(
    args: argparse.Namespace, settings: list[str], seconds: float, expected: dict
) -> None:
    moments, kills = random.Random(args.seed), 0
    work_dir = Path(args.work_dir, 'killed')
    while kills < args.kills:
        shutil.rmtree(work_dir, ignore_errors=True)
        running = True
        while running:
            log = work_dir / 'log'
            begun = read(log).count(BEGINS)
            process = start(work_dir, args.config, settings)
            await_training(process, log, begun)
            moment = moments.uniform(0, seconds) if kills < args.kills else None
            process.join(moment)
            running = process.is_alive()
            if running:
                process.kill()
                process.join()
                kills += 1
                note = work_dir / 'last_checkpoint'
                last = Path(note.read_text()).name if note.exists() else 'no checkpoint'
                print(f'kill {kills}: after {moment:.2f} s, with {last}', flush=True)
        check_end(process, log)
        compare(expected, work_dir)


def main() -> None:
    args = parse_args()
    # Forks of a process with threads of torch's would wait for these for ever.
    torch.set_num_threads(1)
    settings = settings_of(args)
    whole = Path(args.work_dir, 'whole')
    shutil.rmtree(whole, ignore_errors=True)
    process = start(whole, args.config, settings)
    await_training(process, whole / 'log', 0)
    began = time.monotonic()
    process.join()
    check_end(process, whole / 'log')
    seconds = time.monotonic() - began
    print(f'without a kill: {seconds:.1f} s', flush=True)
    kill_and_resume(args, settings, seconds, outcome(whole))


if __name__ == '__main__':
    main()
