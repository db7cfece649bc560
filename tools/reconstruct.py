"""Show how well a pre-trained model reconstructs pictures of which it sees a part."""

import argparse
from typing import Any

from mmcnv2.apis import FCMAEInferencer
from mmcnv2.engine.launch import checkpoint_path, config_path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=config_path, help='path of the config')
    parser.add_argument('checkpoint', type=checkpoint_path, help='path or URL')
    parser.add_argument('input', help='path of a picture, or of a folder of pictures')
    parser.add_argument(
        '--out-dir',
        required=True,
        help='where the original, the masked input and the '
        'reconstruction go, side by side in a file for each picture',
    )
    parser.add_argument(
        '--device', help='cpu, cuda:0, ...; an accelerator if there is one by default'
    )
    parser.add_argument(
        '--batch-size', type=positive, default=8, help='pictures to reconstruct at once'
    )
    return parser.parse_args()


def positive(text: str) -> int:
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f'{text} is no positive number')


def predict(args: argparse.Namespace) -> list[dict[str, Any]]:
    reconstruct = FCMAEInferencer(
        args.config, args.checkpoint, args.device, show_progress=True
    )
    results = reconstruct(args.input, batch_size=args.batch_size, out_dir=args.out_dir)
    return results['predictions']


def main() -> None:
    args = parse_args()
    try:
        predictions = predict(args)
    except (FileNotFoundError, RuntimeError, TypeError) as error:
        raise SystemExit(str(error)) from None
    for each in predictions:
        print(
            f'loss {each["loss"]:.4f}  PSNR {each["psnr"]:.2f} dB  {each["img_path"]}'
        )
    for name in ('loss', 'psnr'):
        mean = sum(each[name] for each in predictions) / len(predictions)
        print(f'mean {name} of {len(predictions)} pictures: {mean:.4f}')
    print(f'Pictures are in {args.out_dir}.')


if __name__ == '__main__':
    main()
