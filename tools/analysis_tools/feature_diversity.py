"""Measure how diverse the features of checkpoints are, layer by layer.

Writes diversity.csv, diversity.png (feature distance against depth, a line for each
checkpoint) and channels_NAME.png (channel maps of one layer, for each checkpoint).
Checkpoints are of FCMAE, of detectors or of segmentors, with GRN or without; the
backbone alone is run.
"""

import argparse
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# First, since it explains what may be wrong with the packages that follow.
import mmcnv2  # noqa: F401

# isort: split
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from PIL import Image
from torch import Tensor

from mmcnv2.datasets import UnlabelledImages
from mmcnv2.engine import PretrainedBackbone
from mmcnv2.engine.conversion import load_weights
from mmcnv2.engine.launch import checkpoint_path, config_path
from mmcnv2.evaluation import DiversityRecorder, find_layers
from mmcnv2.models import ConvNeXtV2, FCMAEDataPreprocessor
from mmcnv2.models.convnextv2 import has_grn
from mmcnv2.models.fcmae import draw_mask
from mmcnv2.models.tiles import STRIDE
from mmcnv2.registry import MODELS
from mmcnv2.visualization import channel_grid, diversity_plot, unpack_tokens

COLUMNS = ('checkpoint', 'layer', 'depth', 'distance', 'dead', 'saturated')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', type=config_path, help='path of the config')
    parser.add_argument(
        'checkpoint', type=checkpoint_path, nargs='+', help='paths or URLs'
    )
    parser.add_argument('--input', required=True, help='folder of pictures')
    parser.add_argument('--out-dir', type=Path, required=True, help='where files go')
    parser.add_argument(
        '--mask-ratio',
        type=float,
        help='hide this share of the patches, as in pre-training; whole pictures are '
        'shown if left out',
    )
    parser.add_argument(
        '--measure',
        metavar='LAYERS',
        default='stages.*.*',
        help='layers to measure, * standing for any part between two dots: the output '
        'of each block (stages.*.*) if left out; stages.*.*.act for what enters GRN',
    )
    parser.add_argument(
        '--layer',
        help='layer whose channel maps of the first picture are painted; the middle '
        'one of those measured if left out',
    )
    parser.add_argument(
        '--size',
        type=picture_size,
        default=224,
        help='side of the square that pictures are resized to (default: 224)',
    )
    parser.add_argument('--batch-size', type=int, default=8, help='pictures at once')
    parser.add_argument(
        '--device', default=get_device(), help='cpu, cuda:0, ... (default: %(default)s)'
    )
    return parser.parse_args()


def picture_size(text: str) -> int:
    if text.isdecimal() and int(text) and int(text) % STRIDE == 0:
        return int(text)
    raise argparse.ArgumentTypeError(f'{text} is not a multiple of {STRIDE}')


def short_names(checkpoints: list[str]) -> list[str]:
    """Name each by the end of its path, as short as differs from the others'."""
    parts = [Path(each).with_suffix('').parts for each in checkpoints]
    for length in range(1, max(map(len, parts)) + 1):
        names = ['_'.join(each[-length:]).replace('/', '') for each in parts]
        if len(set(names)) == len(names):
            return names
    raise SystemExit(f'The same checkpoint is given twice: {" ".join(checkpoints)}')


def load_backbone(cfg: Config, checkpoint: str) -> ConvNeXtV2:
    """Build the backbone of the config with the weights of a checkpoint, on the CPU.

    It has no output norms, which are no layers, and GRN if the checkpoint has, so that
    both versions can be compared.
    """
    settings = cfg.model.backbone.to_dict()
    if settings['type'].rpartition('.')[2] != 'ConvNeXtV2':
        raise SystemExit(
            f'{cfg.filename} has a backbone of type {settings["type"]}, but only a '
            'ConvNeXtV2 can be measured.'
        )
    whole = dict(out_indices=(-1,), output_norm=False, init_cfg=None)
    try:
        use_grn = has_grn(load_weights(checkpoint))
        backbone = MODELS.build({**settings, **whole, 'use_grn': use_grn})
        PretrainedBackbone(checkpoint)(backbone)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise SystemExit(
            f'{error}\nGive the config that the checkpoint was trained with instead of '
            f'{cfg.filename}, or one of the same arch.'
        ) from None
    return backbone.eval()


def load_pictures(cfg: Config, folder: str, size: int) -> UnlabelledImages:
    """List the pictures; they are read as the config does in testing, and resized."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    resize = dict(type='Resize', scale=(size, size))
    pipeline = [dataset.pipeline[0], resize, dict(type='PackPretrainInputs')]
    return UnlabelledImages(data_root=folder, pipeline=pipeline, test_mode=True)


def build_preprocessor(cfg: Config) -> FCMAEDataPreprocessor:
    settings = cfg.model.data_preprocessor
    names = [name for name in ('mean', 'std', 'bgr_to_rgb') if name in settings]
    return FCMAEDataPreprocessor(**{name: settings[name] for name in names})


def batches(
    preprocessor: FCMAEDataPreprocessor,
    dataset: UnlabelledImages,
    args: argparse.Namespace,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Give pictures and their masks, which depend on the place of a picture alone."""
    for start in range(0, len(dataset), args.batch_size):
        places = range(start, min(start + args.batch_size, len(dataset)))
        batch = dict(inputs=[dataset[place]['inputs'] for place in places])
        pictures = preprocessor(batch)['inputs']
        yield pictures, draw_masks(pictures, places, args.mask_ratio)


def draw_masks(pictures: Tensor, places: range, ratio: float | None) -> Tensor | None:
    if ratio is None:
        return None
    generators = [torch.Generator().manual_seed(place) for place in places]
    masks = [
        draw_mask(picture[None], ratio, generator)
        for picture, generator in zip(pictures, generators, strict=True)
    ]
    return torch.cat(masks)


@torch.no_grad()
def measure(
    backbone: ConvNeXtV2,
    pattern: str,
    inputs: Iterable[tuple[Tensor, Tensor | None]],
) -> list[dict[str, Any]]:
    """Give a row of the table for each layer, but for the name of the checkpoint."""
    recorder = DiversityRecorder(backbone, [pattern])
    recorder.start()
    for pictures, mask in inputs:
        backbone(pictures, mask)
    recorder.stop()
    depths = {block: depth for depth, block in enumerate(find_layers(backbone), 1)}
    return [
        # The block of stages.2.5.act is stages.2.5.
        dict(layer=layer, depth=depths['.'.join(layer.split('.')[:3])], **values)
        for layer, values in recorder.result().items()
    ]


@torch.no_grad()
def paint(
    backbone: ConvNeXtV2, layer: str, pictures: Tensor, mask: Tensor | None
) -> np.ndarray:
    """Paint the channel maps of the first picture."""
    module = find_layers(backbone, [layer])[layer]
    found: list[Tensor] = []
    with module.register_forward_hook(lambda *call: found.append(call[-1][0])):
        backbone(pictures, mask)
    return channel_grid(found[0] if mask is None else unpack_tokens(found[0], mask[0]))


def middle_layer(backbone: ConvNeXtV2, pattern: str) -> str:
    layers = list(find_layers(backbone, [pattern]))
    return layers[len(layers) // 2]


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        depths, distances = lines.setdefault(row['checkpoint'], ([], []))
        depths.append(row['depth'])
        distances.append(row['distance'])
    diversity_plot(lines).savefig(path)


def main() -> None:
    args = parse_args()
    names = short_names(args.checkpoint)
    cfg = Config.fromfile(args.config)
    init_default_scope('mmcnv2')
    preprocessor = build_preprocessor(cfg).to(args.device)
    dataset = load_pictures(cfg, args.input, args.size)

    args.out_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, checkpoint in zip(names, args.checkpoint, strict=True):
        backbone = load_backbone(cfg, checkpoint).to(args.device)
        inputs = batches(preprocessor, dataset, args)
        rows += [
            dict(checkpoint=name, **row)
            for row in measure(backbone, args.measure, inputs)
        ]
        layer = middle_layer(backbone, args.layer or args.measure)
        first = next(batches(preprocessor, dataset, args))
        maps = Image.fromarray(paint(backbone, layer, *first))
        maps.save(args.out_dir / f'channels_{name}.png')
    write_table(args.out_dir / 'diversity.csv', rows)
    plot(args.out_dir / 'diversity.png', rows)
    print(f'{len(dataset)} pictures measured. Files are in {args.out_dir}:')
    print(f'diversity.csv, diversity.png, channels_*.png (channel maps of {layer}).')


if __name__ == '__main__':
    main()
