"""Convert ConvNeXt V2 checkpoints between this project and other libraries."""

import argparse

from mmcnv2.engine.conversion import FORMATS, TARGETS, convert_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='path of the checkpoint')
    parser.add_argument(
        'target', help='path of the new file: .safetensors, or .pth, .pt or .bin'
    )
    parser.add_argument(
        '--to', required=True, choices=TARGETS, help='format of the new file'
    )
    parser.add_argument(
        '--from',
        dest='source_format',
        choices=FORMATS,
        help='format of the checkpoint; found out by its names if left out',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        conversion = convert_checkpoint(
            args.source, args.target, args.to, args.source_format
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from None
    print(conversion)


if __name__ == '__main__':
    main()
