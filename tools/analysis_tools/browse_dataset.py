"""Show what the train pipeline of a config feeds the model.

Detection and segmentation: pictures with their labels, painted by the config's
visualizer. Pre-training: pictures, each beside what FCMAE would see of it.
"""

import argparse
from pathlib import Path
from typing import Any

# First, since it explains what may be wrong with the packages that follow.
import mmcnv2  # noqa: F401

# isort: split
import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, VISUALIZERS, init_default_scope
from mmengine.runner import set_random_seed
from mmengine.visualization import Visualizer
from PIL import Image
from torch import Tensor

from mmcnv2.engine.launch import add_config_arguments, read_config
from mmcnv2.models.fcmae import draw_mask
from mmcnv2.visualization import displayable, paint_mask

SCOPES = ('mmcnv2', 'mmdet', 'mmseg')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument('--output-dir', type=Path, help='where the pictures go')
    parser.add_argument(
        '--number',
        type=int,
        help='how many pictures, from the first of the data set on; all if left out',
    )
    parser.add_argument('--not-show', action='store_true', help='open no window')
    parser.add_argument(
        '--show-interval', type=float, default=2, help='seconds to show each for'
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='of crops, flips and masks (default: 0)'
    )
    args = parser.parse_args()
    if args.not_show and not args.output_dir:
        parser.error('--not-show leaves nothing to do without --output-dir')
    return args


def check_scope(cfg: Config) -> None:
    if cfg.get('default_scope') not in SCOPES:
        raise SystemExit(
            f'default_scope is {cfg.get("default_scope")}, but pictures are painted '
            f"for {', '.join(SCOPES)}; another library's configs have its own "
            'tools/analysis_tools/browse_dataset.py.'
        )


def paint_labels(
    visualizer: Visualizer, picture: np.ndarray, sample: Any, **where: Any
) -> None:
    """Let the library's visualizer paint the labels."""
    instances = sample.get('gt_instances')
    if instances is not None and 'bboxes' in instances:
        # Pipelines give boxes of MMDetection's own kind, visualizers take tensors.
        instances.bboxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
    visualizer.add_datasample('train', picture, sample, draw_pred=False, **where)


def paint_masked(
    visualizer: Visualizer,
    picture: np.ndarray,
    mask: Tensor,
    show: bool,
    wait_time: float,
    out_file: str | None,
) -> None:
    """Paint a picture and, beside it, what is left of it behind the mask."""
    both = np.hstack([picture, paint_mask(picture, mask)])
    if show:
        visualizer.show(both, 'train', wait_time)
    if out_file:
        Image.fromarray(both).save(out_file)


def main() -> None:
    args = parse_args()
    cfg = read_config(args)
    check_scope(cfg)
    init_default_scope(cfg.default_scope)
    set_random_seed(args.seed)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    visualizer = VISUALIZERS.build({'name': 'browse', **cfg.visualizer})
    visualizer.dataset_meta = dataset.metainfo
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)

    white = cfg.model.get('data_preprocessor', {}).get('data_range', 255.0)
    number = min(args.number or len(dataset), len(dataset))
    for i in range(number):
        item = dataset[i]
        inputs, sample = item['inputs'], item['data_samples']
        # MMCV loads colours as blue, green, red.
        colours = inputs.flip(0) if len(inputs) == 3 else inputs
        picture = displayable(colours, white)
        name = f'{i:06d}_{Path(sample.img_path).stem}.png'
        where = dict(
            show=not args.not_show,
            wait_time=args.show_interval,
            out_file=str(args.output_dir / name) if args.output_dir else None,
        )
        if cfg.default_scope == 'mmcnv2':
            ratio = cfg.model.get('mask_ratio', 0.6)
            (mask,) = draw_mask(inputs[None], ratio)
            paint_masked(visualizer, picture, mask, **where)
        else:
            paint_labels(visualizer, picture, sample, **where)
    if args.output_dir:
        print(f'{number} pictures are in {args.output_dir}.')


if __name__ == '__main__':
    main()
