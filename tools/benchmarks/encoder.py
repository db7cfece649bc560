"""Time and memory of the encoder, forward and backward, by the way it is run.

packed computes on visible patches alone. It is compared with the encoder on whole
pictures (dense), with the same masked in every block, by our kernels (dense-masked) and
as one would write it in PyTorch (dense-masked-plain), with MinkowskiEngine, and with
mmpretrain's SparseConvNeXt (spark). All but dense compute the same, which is checked.
"""

import argparse

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
from mmcnv2.models.fcmae import draw_mask

COLUMNS = {
    'hidden': '{mask_ratio:.0%}',
    'encoder': '{encoder}',
    's (min, max)': '{seconds:.3f} ({fastest:.3f}, {slowest:.3f})',
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
    add_against(parser, OTHERS)
    return parser.parse_args()


def contender(
    name: str,
    encoder: nn.Module,
    image: Tensor,
    mask: Tensor,
    args: argparse.Namespace,
) -> Contender:
    def step() -> None:
        with autocast(args.device, args.dtype):
            (features,) = encoder(image, mask)
        features.float().square().mean().backward()

    return Contender(dict(encoder=name), step, encoder)


@torch.no_grad()
def differences(
    encoders: dict[str, nn.Module],
    image: Tensor,
    mask: Tensor,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Compare all that see the same with packed."""
    with autocast(args.device, args.dtype):
        found = {
            name: visible(encoder(image, mask)[0], mask)
            for name, encoder in encoders.items()
            if name != 'dense'
        }
    apart = {name: difference(found[name], found['packed']) for name in found}
    for name, value in apart.items():
        check_agreement(name, value, args.dtype)
    return apart


def key(name: str, ratio: float) -> tuple[str, float | None]:
    """Once is enough for what does not look at the mask."""
    return name, None if name == 'dense' else ratio


def rows_of(contenders: dict[str, Contender], mask: Tensor, **more) -> list[dict]:
    packed = contenders['packed']
    found = dict(more, limit=1 / (~mask).float().mean().item())
    return [
        each.row()
        | found
        | dict(
            times_packed=each.times(packed),
            times_packed_memory=each.peak / packed.peak,
        )
        for each in contenders.values()
    ]


def main() -> None:
    args = parse_args()
    packed = build_packed(args.arch)
    others, absent = build_others(packed, args.against)
    encoders = {'packed': packed} | others
    encoders = {name: each.to(args.device) for name, each in encoders.items()}
    image = torch.randn(args.batch_size, 3, args.size, args.size, device=args.device)

    masks = {ratio: draw_mask(image, ratio) for ratio in args.mask_ratios}
    contenders: dict[tuple[str, float | None], Contender] = {}
    apart = {}
    for ratio, mask in masks.items():
        apart[ratio] = differences(encoders, image, mask, args)
        for name, encoder in encoders.items():
            each = contender(name, encoder, image, mask, args)
            contenders.setdefault(key(name, ratio), each)
    measure(list(contenders.values()), args.rounds, args.device)

    rows = []
    for ratio, mask in masks.items():
        now = {name: contenders[key(name, ratio)] for name in encoders}
        for row in rows_of(now, mask, mask_ratio=ratio):
            rows.append(row | dict(difference=apart[ratio].get(row['encoder'])))
    report(args, rows, COLUMNS, absent)


if __name__ == '__main__':
    main()
