"""Time and memory of the encoder, forward and backward, by the way it is run.

packed computes on visible patches alone. It is compared with the encoder on whole
pictures (dense), with the same masked in every block, by our kernels (dense-masked) and
as one would write it in PyTorch (dense-masked-plain), with MinkowskiEngine, and with
mmpretrain's SparseConvNeXt (spark). All but dense compute the same, which is checked.
Compiled is torch.compile, in a mode which on GPUs calls all kernels at once. Graphed is
plain, recorded in a CUDA graph, which does so without a compiler, on GPUs alone.
"""

import argparse
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmcnv2.benchmarks.encoders import OTHERS, build_others, build_packed, visible
from mmcnv2.benchmarks.timing import (
    Contender,
    add_against,
    add_arguments,
    autocast,
    check_agreement,
    difference,
    measure,
    peak_bytes,
    report,
)
from mmcnv2.models import ConvNeXtV2
from mmcnv2.models.fcmae import draw_mask

FORMS = ('plain', 'compiled', 'graphed')
NOT_GRAPHED = ('minkowski', 'spark')
COLUMNS = {
    'hidden': '{mask_ratio:.0%}',
    'encoder': '{encoder}',
    'form': '{form}',
    's (min, max)': '{seconds:.3f} ({fastest:.3f}, {slowest:.3f})',
    'pictures/s': '{pictures:.0f}',
    "x packed's": '{times_packed:.2f}',
    'MiB': '{peak_mib:.0f}',
    "x packed's MiB": '{times_packed_memory:.2f}',
    'limit': '{limit:.2f}',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        '--size', type=int, default=224, help='side of a picture (default: 224)'
    )
    parser.add_argument(
        '--mask-ratios', type=float, nargs='+', default=[0.6], help='default: 0.6'
    )
    parser.add_argument(
        '--forms',
        choices=FORMS,
        nargs='+',
        default=['plain'],
        help='compiling takes minutes; quotients are of those of one form',
    )
    add_against(parser, OTHERS)
    return parser.parse_args()


def check_forms(args: argparse.Namespace) -> None:
    """Refuse what no CUDA graph can be made of."""
    if 'graphed' not in args.forms:
        return
    if torch.device(args.device).type != 'cuda':
        raise ValueError(
            'graphed is a form on GPUs; give --device cuda, or leave it out of --forms'
        )
    if set(args.against) & set(NOT_GRAPHED):
        raise ValueError(
            f'{" and ".join(NOT_GRAPHED)} cannot be graphed, for what they do depends '
            'on values; give others to --against'
        )


def contenders_of(
    encoders: dict[str, nn.Module],
    image: Tensor,
    mask: Tensor,
    args: argparse.Namespace,
) -> dict[tuple[str, str], Contender]:
    """Return what runs each encoder in each form."""
    return {
        (name, form): contender(name, form, encoder, image, mask, args)
        for name, encoder in encoders.items()
        for form in args.forms
    }


def contender(
    name: str,
    form: str,
    encoder: nn.Module,
    image: Tensor,
    mask: Tensor,
    args: argparse.Namespace,
) -> Contender:
    told, run = {}, encoder
    if isinstance(encoder, ConvNeXtV2):
        told = dict(num_visible=int((~mask[0]).sum()))
    if form == 'compiled':
        # A change of pictures or of their visible share makes another graph.
        kind = dict(fullgraph=True, dynamic=False, mode='reduce-overhead')
        run = torch.compile(encoder, **kind)

    def step() -> Tensor:
        with autocast(args.device, args.dtype):
            (features,) = run(image, mask, **told)
        # A graph of CUDA's would write over them the next time.
        found = features.detach().clone()
        features.float().square().mean().backward()
        return found

    found = Contender(dict(encoder=name, form=form), step, encoder)
    return graphed(found, args.device) if form == 'graphed' else found


def graphed(each: Contender, device: str) -> Contender:
    """Let a CUDA graph take a contender's steps, in as much memory."""
    # What a first step sets up is no part of a graph.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        each.step()
    torch.cuda.current_stream().wait_stream(stream)
    peak = peak_bytes(each.step, device)
    graph = torch.cuda.CUDAGraph()
    # Its gradients are its own.
    each.model.zero_grad()
    with torch.cuda.graph(graph):
        found = each.step()
    each.model.zero_grad()

    def step() -> Tensor:
        graph.replay()
        return found

    return replace(each, step=step, peak=peak)


def differences(
    contenders: dict[tuple[str, str], Contender], mask: Tensor, dtype: str
) -> dict[tuple[str, str], float]:
    """Compare all that see the same with packed."""
    found = {
        key: visible(each.step(), mask)
        for key, each in contenders.items()
        if each.what['encoder'] != 'dense'
    }
    packed = next(iter(found.values()))
    apart = {key: difference(each, packed) for key, each in found.items()}
    for (name, _), value in apart.items():
        check_agreement(name, value, dtype)
    return apart


def key(name: str, form: str, ratio: float) -> tuple[str, str, float | None]:
    """Once is enough for what does not look at the mask."""
    return name, form, None if name == 'dense' else ratio


def rows_of(
    contenders: dict[tuple[str, str], Contender], mask: Tensor, **more
) -> list[dict]:
    found = dict(more, limit=1 / (~mask).float().mean().item())
    rows = []
    for (_, form), each in contenders.items():
        packed, row = contenders['packed', form], each.row()
        quotients = dict(
            pictures=len(mask) / row['seconds'],
            times_packed=each.times(packed),
            # The memory of compiled graphs is set aside, out of sight.
            times_packed_memory=each.peak / packed.peak if packed.peak else math.nan,
        )
        rows.append(row | found | quotients)
    return rows


def main() -> None:
    args = parse_args()
    check_forms(args)
    packed = build_packed(args.arch)
    others, absent = build_others(packed, args.against)
    encoders = {'packed': packed} | others
    encoders = {name: each.to(args.device) for name, each in encoders.items()}
    image = torch.randn(args.batch_size, 3, args.size, args.size, device=args.device)

    masks = {ratio: draw_mask(image, ratio) for ratio in args.mask_ratios}
    contenders: dict[tuple[str, str, float | None], Contender] = {}
    apart = {}
    for ratio, mask in masks.items():
        now = contenders_of(encoders, image, mask, args)
        apart[ratio] = differences(now, mask, args.dtype)
        for (name, form), each in now.items():
            contenders.setdefault(key(name, form, ratio), each)
    measure(list(contenders.values()), args.rounds, args.device)

    rows = []
    for ratio, mask in masks.items():
        now = {
            (name, form): contenders[key(name, form, ratio)]
            for name in encoders
            for form in args.forms
        }
        for row in rows_of(now, mask, mask_ratio=ratio):
            told = apart[ratio].get((row['encoder'], row['form']))
            rows.append(row | dict(difference=told))
    report(args, rows, COLUMNS, absent)


if __name__ == '__main__':
    main()
