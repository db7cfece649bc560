"""How contenders are measured in one process, and how the figures are told."""

import json
import os
import platform
import sys
import time
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..models import ARCHITECTURES, kernels

T = TypeVar('T')

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)

# How far the outputs of equal networks may lie apart, as a share of the largest value.
_TOLERANCES = dict(float32=1e-3, bfloat16=5e-2)
# Those whose kernels PyTorch chooses by.
_CPU_FLAGS = ('avx2', 'fma', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'amx_bf16')
_LIBRARIES = (
    'torch',
    'triton',
    'cv2',
    'mmcnv2',
    'mmengine',
    'mmcv',
    'mmdet',
    'mmseg',
    'mmpretrain',
    'timm',
    'transformers',
    'MinkowskiEngine',
)


def add_arguments(
    parser: ArgumentParser,
    batch_size: int | None = 8,
    rounds: int = 7,
    several_dtypes: bool = False,
) -> None:
    """Add the arguments that all benchmarks share.

    Args:
        parser: Gets ``--arch``, ``--batch-size``, ``--dtype``, ``--device``,
            ``--rounds`` and ``--json``.
        batch_size: The default.
        rounds: The default.
        several_dtypes: Whether ``--dtype`` takes more than one, to compare them.
    """
    parser.add_argument('--arch', choices=ARCHITECTURES, default='tiny')
    parser.add_argument('--batch-size', type=int, default=batch_size)
    parser.add_argument(
        '--dtype',
        choices=DTYPES,
        nargs='+' if several_dtypes else None,
        default=['float32'] if several_dtypes else 'float32',
        help='bfloat16 is autocast, weights stay in float32',
    )
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--device', choices=('cpu', 'cuda'), default=device)
    parser.add_argument(
        '--rounds', type=int, default=rounds, help='turns that each contender takes'
    )
    parser.add_argument('--json', type=Path, help='write every figure to this file')


def add_against(
    parser: ArgumentParser, names: Sequence[str], default: Sequence[str] | None = None
) -> None:
    """Add ``--against``, which chooses what ours is compared with.

    Args:
        parser: Gets it.
        names: What there is to choose from.
        default: All of it by default.
    """
    default = list(names if default is None else default)
    told = f'default: {" ".join(default)}'
    parser.add_argument(
        '--against', choices=names, nargs='*', default=default, help=told
    )


class _Size(Action):
    """Height and width, which are equal if one is given."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if len(values) > 2:
            parser.error(f'{option_string} takes height and width, or one side')
        setattr(namespace, self.dest, (values[0], values[-1]))


def add_size(parser: ArgumentParser, default: str) -> None:
    """Add ``--size``, height and width of a picture, None by default.

    Args:
        parser: Gets it.
        default: What its help says of that.
    """
    told = f'height and width of a picture, or one side of a square; {default}'
    kind: dict[str, Any] = dict(type=int, nargs='+', action=_Size, metavar='SIDE')
    parser.add_argument('--size', help=told, **kind)


def autocast(device: str, dtype: str) -> torch.autocast:
    """Autocast, if at all.

    Args:
        device: As of ``--device``.
        dtype: As of ``--dtype``.

    Returns:
        The context in which a contender runs.
    """
    enabled = DTYPES[dtype] != torch.float32
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


@dataclass(eq=False)
class Contender:
    """What takes turns with others, and what has been measured of it.

    Attributes:
        what: What it is, by column of the table.
        step: What is measured.
        model: Whose gradients are dropped before a step is timed, as in training.
        seconds: Of each step.
        peak: The most that was allocated at once in a step, in bytes. Weights are not
            in it, nor gradients, which are there before. Measured unless given.
    """

    what: dict[str, Any]
    step: Callable[[], Any]
    model: nn.Module
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    def row(self) -> dict[str, Any]:
        """Return the figures by column of the table."""
        return dict(
            self.what,
            seconds=median(self.seconds),
            fastest=min(self.seconds),
            slowest=max(self.seconds),
            turns=self.seconds,
            peak_mib=self.peak / 2**20,
        )

    def times(self, other: 'Contender') -> float:
        """Return how many times as long as another it takes.

        Args:
            other: What has been measured in the same turns.

        Returns:
            The median of the quotients of each turn: a machine's pace changes more
            from one minute to the next than within a turn.
        """
        return median(map(truediv, self.seconds, other.seconds))


def measure(contenders: Sequence[Contender], rounds: int, device: str) -> None:
    """Measure contenders in turns.

    A turn is two steps, and the second is timed: in training the one before was of the
    same kind too, and has left its memory and caches.

    Args:
        contenders: All of them. Each is warmed up first, and its memory measured.
        rounds: How often each is timed.
        device: Where they run.
    """
    for each in contenders:
        # Until gradients exist.
        each.step()
        each.peak = each.peak or peak_bytes(each.step, device)
    for each in in_turns(contenders, rounds):
        for _ in range(2):
            each.model.zero_grad()
            last = seconds(each.step, device)
        each.seconds.append(last)


def in_turns(contenders: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield contenders there and back, so that nobody always runs after the same one.

    Args:
        contenders: All of them.
        rounds: How often each has its turn.

    Yields:
        Whose turn it is.
    """
    for number in range(rounds):
        yield from contenders[:: (-1) ** number]


def seconds(step: Callable[[], Any], device: str) -> float:
    """Measure a step.

    Args:
        step: What is measured.
        device: Where it runs.

    Returns:
        How long it takes, in seconds.
    """
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    """Wait until all is done that a GPU was told to do.

    Args:
        device: If it is none, nothing has to be waited for.
    """
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Measure the memory of a step.

    Args:
        step: What is measured.
        device: Where it runs.

    Returns:
        The most that PyTorch allocates at once, in bytes, besides what was there.
    """
    if torch.device(device).type == 'cuda':
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    allocations = [event for event in events if event.name() == '[memory]']
    now = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def difference(found: Tensor, expected: Tensor) -> float:
    """Compare tensors.

    Args:
        found: Of any shape and dtype.
        expected: Of the same shape.

    Returns:
        The largest difference, as a share of the largest value expected.
    """
    apart = (found.float() - expected.float()).abs().max()
    return float(apart / expected.float().abs().max())


def check_agreement(name: str, apart: float, dtype: str) -> None:
    """Stop unless a contender computes what the others do.

    Args:
        name: Of the contender.
        apart: Its :func:`difference` from ours.
        dtype: What it computes in.

    Raises:
        RuntimeError: If it lies too far apart.
    """
    # Not a number is no agreement either.
    if not apart <= _TOLERANCES[dtype]:
        raise RuntimeError(
            f'{name} computes something else: it differs from ours by {apart:.1e} of '
            f'the largest value, and {_TOLERANCES[dtype]:.0e} is allowed in {dtype}'
        )


def report(
    args: Namespace,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    absent: Mapping[str, str] | None = None,
    **more: Any,
) -> None:
    """Print the figures as a table, and write them to ``--json``.

    Args:
        args: Of the command line.
        rows: The figures.
        columns: How to write a row in each column, by the column's head.
        absent: Why a contender did not run, by its name.
        **more: What else there is to write to the file.
    """
    machine = describe_machine(args.device)
    absent = absent or {}
    told = {name: value for name, value in vars(args).items() if name != 'json'}
    print('; '.join(f'{name}: {_tell(value)}' for name, value in told.items()))
    print('; '.join(f'{name}: {_tell(value)}' for name, value in machine.items()))
    print(f'\n{table(rows, columns)}')
    if absent:
        print()
    for name, why in absent.items():
        print(f'Absent: {name} ({why}).')
    if args.json:
        figures = dict(arguments=told, machine=machine, absent=absent, rows=rows)
        text = json.dumps(figures | more, indent=1, default=str)
        args.json.write_text(text + '\n')


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return a table in Markdown; arguments as of :func:`report`."""
    lines = [[form.format(**row) for form in columns.values()] for row in rows]
    heads = [list(columns), ['---'] * len(columns)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in heads + lines)


def describe_machine(device: str) -> dict[str, Any]:
    """Describe what the figures depend on.

    Args:
        device: Where contenders have run.

    Returns:
        Hardware, threads and versions, by name.
    """
    model, flags = _processor()
    machine: dict[str, Any] = dict(
        cpu=model,
        flags=[flag for flag in _CPU_FLAGS if flag in flags],
        cores=_cores(),
        threads=torch.get_num_threads(),
        kernels=torch.backends.cpu.get_cpu_capability(),
        own_kernels='compiled' if kernels.are_compiled() else 'absent',
    )
    if torch.device(device).type == 'cuda':
        machine['gpu'] = torch.cuda.get_device_name(device)
    loaded = {name: sys.modules[name] for name in _LIBRARIES if name in sys.modules}
    versions = {name: module.__version__ for name, module in loaded.items()}
    return machine | dict(versions=dict(python=platform.python_version(), **versions))


def _cores() -> int | None:
    """Count those that this process may use, as far as the system tells."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _processor() -> tuple[str, list[str]]:
    """Return the name of the CPU and its flags, as far as the system tells."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.split(':', 1) for line in lines if ':' in line)
    told = {name.strip(): value.strip() for name, value in pairs}
    return told.get('model name', platform.machine()), told.get('flags', '').split()


def _tell(value: Any) -> str:
    """Write a value as one would say it."""
    if isinstance(value, Mapping):
        return ', '.join(f'{name} {_tell(each)}' for name, each in value.items())
    if isinstance(value, list | tuple):
        return ' '.join(map(_tell, value))
    return str(value)
