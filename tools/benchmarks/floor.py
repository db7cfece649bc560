"""What this machine can do at most, and how long the encoder takes at that rate.

The peak is that of matrix products, of a large square one and of those of the encoder's
pointwise layers, and of copies between arrays that no cache holds. The floor counts the
operations that visible positions need, forward and twice as many backward.
"""

import argparse

from mmcnv2.benchmarks.timing import (
    add_arguments,
)

COLUMNS = {
    'what': '{what}',
    's (min, max)': '{seconds:.4f} ({fastest:.4f}, {slowest:.4f})',
    'reached': '{rate:.1f} {unit}',
}
FLOORS = {
    'stage': '{stage}',
    'pointwise, GFLOP': '{pointwise:.1f}',
    'depthwise, GFLOP': '{depthwise:.1f}',
    'floor by the square product, s': '{floor:.4f}',
    "by the stage's own product, s": '{own_floor:.4f}',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, rounds=15)
    parser.add_argument('--size', type=int, default=224, help='side of a picture')
    parser.add_argument('--mask-ratio', type=float, default=0.6)
    parser.add_argument('--side', type=int, default=2048, help='of the square product')
    parser.add_argument('--mib', type=int, default=256, help='what is copied')
    return parser.parse_args()
