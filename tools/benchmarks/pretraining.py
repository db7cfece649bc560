"""Pictures per second of pre-training, data loading included, and where time goes.

JPEG files are painted, of the size and the weight of ImageNet's, and the recipe of
configs/fcmae reads them. The encoder on visible patches alone (packed) is compared with
others, each within the same model. They take turns, there and back: a turn is some
steps, after as many batches as the loader may have stored have gone by.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

# First, since it explains what may be wrong with the packages that follow.
import mmcnv2  # noqa: F401

# isort: split
import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing
from torch import Tensor, nn

from mmcnv2.benchmarks.encoders import OTHERS, build_others, build_packed, visible
from mmcnv2.benchmarks.timing import (
    add_against,
    add_arguments,
    autocast,
    check_agreement,
    difference,
    in_turns,
    report,
    synchronise,
)
from mmcnv2.datasets.scene_painter import paint_scene
from mmcnv2.models import FCMAE
from mmcnv2.registry import MODELS

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
PHASES = ('waiting', 'forward', 'backward', 'optimizer')
COLUMNS = {
    'encoder': '{encoder}',
    'pictures/s (min, max)': '{rate:.1f} ({slowest:.1f}, {fastest:.1f})',
    "x packed's time": '{times_packed:.2f}',
    **{f'{name}, ms': f'{{{name}:.1f}} ({{{name}_share:.1%}})' for name in PHASES},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, rounds=3)
    parser.add_argument('--size', type=int, default=224, help='side of a crop')
    parser.add_argument('--mask-ratio', type=float, default=0.6)
    masked = [name for name in OTHERS if name != 'dense']
    add_against(parser, masked, default=['dense-masked'])
    parser.add_argument('--workers', type=int, default=2, help='loader processes')
    parser.add_argument('--steps', type=int, default=20, help='steps in a turn')
    parser.add_argument('--pictures', type=int, default=256, help='files to paint')
    parser.add_argument(
        '--picture-size', type=int, nargs=2, default=[375, 500], help='height, width'
    )
    parser.add_argument('--quality', type=int, default=90, help='of the JPEG files')
    return parser.parse_args()


def paint_pictures(folder: Path, args: argparse.Namespace) -> float:
    """Write JPEG files, and return how large they are, in KiB.

    They are pieces of a wall of demo scenes, with the grain that a camera adds.
    """
    rng = np.random.default_rng(0)
    height, width = args.picture_size
    scenes = [paint_scene(rng).picture for _ in range(16)]
    side = len(scenes[0])
    shape = (-(-height // side), -(-width // side))
    sizes = []
    for i in range(args.pictures):
        chosen = rng.integers(len(scenes), size=shape)
        wall = np.vstack([np.hstack([scenes[j] for j in row]) for row in chosen])
        grain = rng.normal(0, 8, (height, width, 3))
        picture = (wall[:height, :width] + grain).clip(0, 255).astype(np.uint8)
        path = folder / f'{i:05}.jpg'
        cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, args.quality])
        sizes.append(path.stat().st_size)
    return float(np.mean(sizes)) / 1024


def read_config(folder: Path, args: argparse.Namespace) -> Config:
    """Read the recipe, of which a step shall be a batch, and a tiny one."""
    name = f'fcmae_convnextv2-{args.arch}_800e_imagenet.py'
    cfg = Config.fromfile(CONFIGS / 'fcmae' / name)
    loader = cfg.train_dataloader
    loader.update(batch_size=args.batch_size, num_workers=args.workers)
    loader.persistent_workers = args.workers > 0
    # Without epochs, after which loaders would start anew.
    loader.sampler = dict(type='InfiniteSampler', shuffle=True)
    loader.dataset.update(data_root=str(folder), data_prefix=dict(img_path=''))
    [crop] = [t for t in loader.dataset.pipeline if t.type == 'RandomResizedCrop']
    crop.scale = args.size
    cfg.model.mask_ratio = args.mask_ratio
    cfg.optim_wrapper.accumulative_counts = 1
    cfg.optim_wrapper.optimizer.lr = 1e-6
    # It looks for a backbone of ours; how parameters are grouped costs nothing.
    for name in ('constructor', 'paramwise_cfg'):
        cfg.optim_wrapper.pop(name)
    return cfg


class Tokens(nn.Module):
    """An encoder whose features, of whatever kind, FCMAE's decoder takes."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, pictures: Tensor, mask: Tensor, num_visible: int | None
    ) -> tuple[Tensor]:
        (features,) = self.encoder(pictures, mask)
        return (visible(features, mask).unflatten(0, (len(mask), -1)),)


class Training:
    """A model in training, and the seconds that each phase of its steps took."""

    def __init__(self, model: FCMAE, cfg: Config, args: argparse.Namespace) -> None:
        self.model = model
        self.optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        self.args = args
        self.turns: list[dict[str, float]] = []

    def turn(self, batches: Iterator[dict]) -> None:
        """Train for some steps, once the batches stored before it are gone."""
        for _ in range(stored_batches(self.args)):
            self.step(batches)
        spent = dict.fromkeys(PHASES, 0.0)
        for _ in range(self.args.steps):
            for phase, duration in self.step(batches).items():
                spent[phase] += duration / self.args.steps
        self.turns.append(spent)

    def step(self, batches: Iterator[dict]) -> dict[str, float]:
        """Do what ``train_step`` does, and return the seconds of each phase."""
        times = [self.now()]
        batch = next(batches)
        times.append(self.now())
        data = self.model.data_preprocessor(batch, training=True)
        with autocast(self.args.device, self.args.dtype):
            losses = self.model(**data, mode='loss')
        loss, _ = self.model.parse_losses(losses)
        times.append(self.now())
        self.optim_wrapper.backward(loss)
        times.append(self.now())
        self.optim_wrapper.step()
        self.optim_wrapper.zero_grad()
        times.append(self.now())
        return dict(zip(PHASES, np.diff(times).tolist(), strict=True))

    def now(self) -> float:
        synchronise(self.args.device)
        return time.perf_counter()

    def row(self) -> dict[str, Any]:
        batch_size = self.args.batch_size
        rates = [batch_size / sum(each.values()) for each in self.turns]
        phases = {p: median(each[p] for each in self.turns) * 1e3 for p in PHASES}
        whole = sum(phases.values())
        shares = {f'{phase}_share': phases[phase] / whole for phase in PHASES}
        return dict(
            rate=median(rates),
            slowest=min(rates),
            fastest=max(rates),
            turns=self.turns,
            **phases,
            **shares,
        )


def stored_batches(args: argparse.Namespace) -> int:
    """Return how many batches loaders prepare ahead (two each), and one more."""
    return 2 * args.workers + 1


def build_models(
    cfg: Config, args: argparse.Namespace
) -> tuple[dict[str, FCMAE], dict[str, str]]:
    """Build a model for each encoder, and tell why others are absent."""
    torch.manual_seed(0)
    base = MODELS.build(cfg.model)
    packed = build_packed(args.arch)
    others, absent = build_others(packed, args.against)
    models = {}
    for name, encoder in ({'packed': packed} | others).items():
        models[name] = deepcopy(base)
        models[name].backbone = Tokens(encoder)
        models[name].to(args.device)
    return models, absent


@torch.no_grad()
def differences(models: dict[str, FCMAE], args: argparse.Namespace) -> dict[str, float]:
    """Compare what all predict for one batch under one mask."""
    pictures = torch.randn(2, 3, args.size, args.size, device=args.device)
    mask = models['packed'].random_mask(pictures)
    with autocast(args.device, args.dtype):
        found = {
            name: each.reconstruct(pictures, mask) for name, each in models.items()
        }
    apart = {name: difference(found[name], found['packed']) for name in found}
    for name, value in apart.items():
        check_agreement(name, value, args.dtype)
    return apart


def loading_rate(batches: Iterator[dict], args: argparse.Namespace) -> float:
    """Return the pictures per second of loaders that have the machine to themselves."""
    for _ in range(stored_batches(args)):
        next(batches)
    start = time.perf_counter()
    for _ in range(args.steps):
        next(batches)
    return args.steps * args.batch_size / (time.perf_counter() - start)


def rows_of(trainings: dict[str, Training], apart: dict[str, float]) -> list[dict]:
    rows = [
        dict(encoder=name, **each.row(), difference=apart[name])
        for name, each in trainings.items()
    ]
    for row in rows:
        row['times_packed'] = rows[0]['rate'] / row['rate']
    return rows


def main() -> None:
    args = parse_args()
    init_default_scope('mmcnv2')
    with tempfile.TemporaryDirectory() as folder:
        kib = paint_pictures(Path(folder), args)
        cfg = read_config(Path(folder), args)
        set_multi_processing(**cfg.env_cfg.mp_cfg)
        models, absent = build_models(cfg, args)
        apart = differences(models, args)
        trainings = {name: Training(each, cfg, args) for name, each in models.items()}
        batches = iter(Runner.build_dataloader(cfg.train_dataloader, seed=0))
        alone = loading_rate(batches, args)
        for training in in_turns(list(trainings.values()), args.rounds):
            training.turn(batches)
        # Before their pictures go.
        del batches
    rows = rows_of(trainings, apart)
    figures = dict(loading_alone=alone, file_kib=kib)
    report(args, rows, COLUMNS, absent, **figures)
    print(
        f'\nFiles are of {kib:.0f} KiB. Loading alone gives {alone:.0f} pictures per '
        'second.'
    )


if __name__ == '__main__':
    main()
