"""Time and memory of the encoder, forward and backward, by the way it is run.

packed computes on visible patches alone. It is compared with the encoder on whole
pictures (dense), with the same masked in every block, by our kernels (dense-masked) and
as one would write it in PyTorch (dense-masked-plain), with MinkowskiEngine, and with
mmpretrain's SparseConvNeXt (spark). All but dense compute the same, which is checked.
Compiled is torch.compile, in a mode which on GPUs calls all kernels at once.
"""

import argparse
from collections.abc import Callable
from functools import partial

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
    report,
)
from mmcnv2.models import ConvNeXtV2 as Ours
from mmcnv2.models.fcmae import draw_mask

Run = Callable[[Tensor, Tensor], Tensor]

FORMS = ('plain', 'compiled')
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


def runs_of(
    encoders: dict[str, nn.Module], forms: list[str]
) -> dict[tuple[str, str], Run]:
    """Return what runs each encoder in each form."""
    runs = {}
    for name, encoder in encoders.items():
        for form in forms:
            # A change of pictures or of their visible share makes another graph.
            kind = dict(fullgraph=True, dynamic=False, mode='reduce-overhead')
            run = encoder if form == 'plain' else torch.compile(encoder, **kind)
            runs[name, form] = partial(run_encoder, run, isinstance(encoder, Ours))
    return runs


def run_encoder(run: Callable, is_ours: bool, image: Tensor, mask: Tensor) -> Tensor:
    if not is_ours:
        return run(image, mask)[0]
    return run(image, mask, num_visible=int((~mask[0]).sum()))[0]


def contender(
    name: str,
    form: str,
    encoder: nn.Module,
    run: Run,
    image: Tensor,
    mask: Tensor,
    args: argparse.Namespace,
) -> Contender:
    def step() -> None:
        with autocast(args.device, args.dtype):
            features = run(image, mask)
        features.float().square().mean().backward()

    return Contender(dict(encoder=name, form=form), step, encoder)


def differences(
    runs: dict[tuple[str, str], Run],
    image: Tensor,
    mask: Tensor,
    args: argparse.Namespace,
) -> dict[tuple[str, str], float]:
    """Compare all that see the same with packed."""
    found = {}
    for (name, form), run in runs.items():
        if name != 'dense':
            with autocast(args.device, args.dtype):
                # As it is in training; a graph of CUDA's writes over it the next time.
                features = run(image, mask).detach().clone()
            found[name, form] = visible(features, mask)
    packed = found['packed', args.forms[0]]
    apart = {key: difference(each, packed) for key, each in found.items()}
    for (name, _), value in apart.items():
        check_agreement(name, value, args.dtype)
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
            times_packed_memory=each.peak / packed.peak,
        )
        rows.append(row | found | quotients)
    return rows


def main() -> None:
    args = parse_args()
    packed = build_packed(args.arch)
    others, absent = build_others(packed, args.against)
    encoders = {'packed': packed} | others
    encoders = {name: each.to(args.device) for name, each in encoders.items()}
    runs = runs_of(encoders, args.forms)
    image = torch.randn(args.batch_size, 3, args.size, args.size, device=args.device)

    masks = {ratio: draw_mask(image, ratio) for ratio in args.mask_ratios}
    contenders: dict[tuple[str, str, float | None], Contender] = {}
    apart = {}
    for ratio, mask in masks.items():
        apart[ratio] = differences(runs, image, mask, args)
        for (name, form), run in runs.items():
            each = contender(name, form, encoders[name], run, image, mask, args)
            contenders.setdefault(key(name, form, ratio), each)
    measure(list(contenders.values()), args.rounds, args.device)

    rows = []
    for ratio, mask in masks.items():
        now = {each: contenders[key(*each, ratio)] for each in runs}
        for row in rows_of(now, mask, mask_ratio=ratio):
            told = apart[ratio].get((row['encoder'], row['form']))
            rows.append(row | dict(difference=told))
    report(args, rows, COLUMNS, absent)


if __name__ == '__main__':
    main()
