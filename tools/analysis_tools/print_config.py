"""Print a config as it is once its bases and the overrides are merged."""

import argparse
from pathlib import Path

# First, since it explains what may be wrong with the packages that follow.
import mmcnv2  # noqa: F401

# isort: split
from mmcnv2.engine.launch import add_config_arguments, read_config

SUFFIXES = ('.py', '.json', '.yml')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        '--save-path', type=save_path, help=f'write it to this {"|".join(SUFFIXES)} too'
    )
    return parser.parse_args()


def save_path(text: str) -> Path:
    if text.endswith(SUFFIXES):
        return Path(text)
    raise argparse.ArgumentTypeError(f'{text} does not end in {", ".join(SUFFIXES)}')


def main() -> None:
    args = parse_args()
    cfg = read_config(args)
    print(cfg.pretty_text)
    if args.save_path:
        args.save_path.parent.mkdir(parents=True, exist_ok=True)
        cfg.dump(args.save_path)


if __name__ == '__main__':
    main()
