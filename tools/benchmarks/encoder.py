"""Time and memory of the encoder, forward and backward, by the share that is hidden.

All contenders take turns in one process: the dense encoder, which sees whole pictures,
and the sparse layouts at each mask ratio. Memory is the peak of what a step allocates,
weights and their gradients left out.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median

import torch
from mmengine.device import get_device
from torch import Tensor

from mmcnv2.models import ARCHITECTURES, ConvNeXtV2
from mmcnv2.models.convnextv2 import SPARSE_LAYOUTS
from mmcnv2.models.fcmae import draw_mask


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--arch', choices=ARCHITECTURES, default='tiny')
    parser.add_argument('--size', type=int, default=224, help='side of a picture')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument(
        '--mask-ratios', type=float, nargs='+', default=[0.25, 0.5, 0.6, 0.75, 0.9]
    )
    installed = ['packed'] + ['minkowski'] * bool(find_spec('MinkowskiEngine'))
    parser.add_argument(
        '--sparse', choices=SPARSE_LAYOUTS, nargs='+', default=installed
    )
    parser.add_argument('--rounds', type=int, default=7, help='each contender once')
    parser.add_argument('--device', default=get_device())
    parser.add_argument('--json', help='file for the figures')
    return parser.parse_args()


class Contender:
    """An encoder with its input, and what has been measured of it."""

    def __init__(self, encoder: ConvNeXtV2, image: Tensor, mask: Tensor | None) -> None:
        self.encoder = encoder
        self.args = (image,) if mask is None else (image, mask)
        self.seconds: list[float] = []
        self.peak = 0

    def step(self) -> None:
        self.encoder(*self.args)[-1].square().mean().backward()

    def warm_up(self) -> None:
        """Run until gradients exist, and then once more to see the peak of memory."""
        self.step()
        self.peak = peak_bytes(self.step, self.args[0].device)

    def measure(self) -> None:
        synchronise(self.args[0].device)
        start = time.perf_counter()
        self.step()
        synchronise(self.args[0].device)
        self.seconds.append(time.perf_counter() - start)


def synchronise(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Return the most that was allocated at once during a step, in bytes."""
    if device.type == 'cuda':
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


def make_contenders(args: argparse.Namespace) -> dict[tuple[str, float], Contender]:
    torch.manual_seed(0)
    image = torch.randn(args.batch_size, 3, args.size, args.size, device=args.device)

    def contender(mask: Tensor | None, **kwargs) -> Contender:
        encoder = ConvNeXtV2(
            args.arch, out_indices=(-1,), output_norm=False, **kwargs
        ).to(args.device)
        return Contender(encoder, image, mask)

    contenders = {('dense', 0.0): contender(None)}
    for ratio in args.mask_ratios:
        mask = draw_mask(image, ratio)
        for sparse in args.sparse:
            contenders[sparse, ratio] = contender(mask, sparse=sparse)
    return contenders


def summarise(contenders: dict[tuple[str, float], Contender]) -> list[dict]:
    dense = contenders['dense', 0.0]
    rows = []
    for (name, ratio), each in contenders.items():
        visible = 1.0 if len(each.args) == 1 else (~each.args[1]).float().mean().item()
        rows.append(
            dict(
                encoder=name,
                mask_ratio=ratio,
                limit=1 / visible,
                seconds=median(each.seconds),
                fastest=min(each.seconds),
                slowest=max(each.seconds),
                faster=median(dense.seconds) / median(each.seconds),
                peak_mib=each.peak / 2**20,
                less_memory=dense.peak / each.peak,
            )
        )
    return rows


def main() -> None:
    args = parse_args()
    contenders = make_contenders(args)
    for each in contenders.values():
        each.warm_up()
    for _ in range(args.rounds):
        for each in contenders.values():
            each.measure()
    rows = summarise(contenders)
    device = torch.device(args.device)
    on_gpu = device.type == 'cuda'
    hardware = (
        torch.cuda.get_device_name(device)
        if on_gpu
        else f'{platform.processor() or platform.machine()}, '
        f'{torch.get_num_threads()} threads'
    )
    print(
        f'{args.arch}, {args.batch_size} pictures of {args.size} x {args.size}, '
        f'float32, {hardware}, torch {torch.__version__}; median of {args.rounds}\n'
    )
    print('| encoder | hidden | s (min, max) | x faster | MiB | x less | limit |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    for row in rows:
        print(
            '| {encoder} | {mask_ratio:.0%} | {seconds:.3f} ({fastest:.3f}, '
            '{slowest:.3f}) | {faster:.2f} | {peak_mib:.0f} | {less_memory:.2f} | '
            '{limit:.2f} |'.format(**row)
        )
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(dict(vars(args), hardware=hardware, rows=rows), file, indent=1)


if __name__ == '__main__':
    main()
