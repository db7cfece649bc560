"""Configs of this project, made to run a step within seconds on tiny data."""

from pathlib import Path

import cv2
import pytest
import torch
import yaml
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from torch import nn

from mmcnv2.datasets.demo_scenes import CLASSES, make_demo_scenes
from mmcnv2.models import ARCHITECTURES

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
ALL_RECIPES = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob('*.py')
    if '_base_' not in path.parts
)
DIMS = [8, 8, 16, 16]
SIDE = 128
COUNTS = dict(train=4, val=2, unlabelled=4)
# What in a pipeline says how large a picture gets.
PICTURE_SIZES = dict(scale=(SIDE, SIDE), scales=[(SIDE, SIDE)], crop_size=(SIDE, SIDE))
# What takes the backbone's channels where no neck does.
HEADS = ('decode_head', 'auxiliary_head', 'panoptic_head')


class Start(Hook):
    """Remember the weights that training starts from, which the runner draws."""

    def before_train(self, runner) -> None:
        self.weights = {k: v.clone() for k, v in runner.model.named_parameters()}

    def unmoved(self, model: nn.Module) -> set[str]:
        """Return the names of the weights that are still the same."""
        return {
            name
            for name, value in model.named_parameters()
            if torch.equal(value, self.weights[name])
        }


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    return make_demo_scenes(tmp_path_factory.mktemp('scenes') / 'root', counts=COUNTS)


@pytest.fixture(scope='session')
def ade(tmp_path_factory, scenes):
    """The scenes' pictures and maps in the folders of ADE20K."""
    root = tmp_path_factory.mktemp('ade')
    for split, name in (('train', 'training'), ('val', 'validation')):
        (root / 'images' / name).mkdir(parents=True)
        (root / 'annotations' / name).mkdir(parents=True)
        for picture in (scenes / 'images' / split).iterdir():
            (root / 'images' / name / picture.name).symlink_to(picture)
        for path in (scenes / 'semantic' / split).iterdir():
            maps = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            cv2.imwrite(str(root / 'annotations' / name / path.name), maps)
    return root


def replace(node, values: dict) -> None:
    """Set keys to new values, wherever they stand."""
    if isinstance(node, dict):
        node.update({key: values[key] for key in values if key in node})
        node = list(node.values())
    if isinstance(node, list | tuple):
        for child in node:
            replace(child, values)


def shrink_sizes(model: ConfigDict, side: int = SIDE) -> None:
    """Make quick what hangs on no channel, and keep detections, however poor."""
    replace(
        model,
        dict(
            size=(side, side),
            score_thr=0.0,
            nms_pre=50,
            max_per_img=10,
            max_per_image=10,
            num=16,
            num_queries=20,
            num_grids=[8, 8, 8, 8, 8],
            num_layers=1,
            stacked_convs=1,
            feedforward_channels=64,
            fc_out_channels=64,
        ),
    )


def shrink_model(model: ConfigDict) -> None:
    """Make the backbone small, start it at random, and fit the rest to it."""
    fit_channels(model)
    model.backbone.arch = dict(depths=(1, 1, 1, 1), dims=DIMS)
    model.backbone.init_cfg = None
    # Or a step would leave a block out.
    model.backbone.drop_path_rate = 0.0
    shrink_sizes(model)
    replace(model, dict(conv_out_channels=16))
    if 'decode_head' in model:
        shrink_segmentor(model)
    else:
        fit_classes(model)


def fit_channels(model: ConfigDict) -> None:
    """Put small channels where the recipe has those of its backbone."""
    small = dict(zip(ARCHITECTURES[model.backbone.arch]['dims'], DIMS, strict=True))
    takers = ('neck',) if 'neck' in model else HEADS
    for taker in (model[key] for key in takers if key in model):
        given = taker.get('in_channels')
        if isinstance(given, int):
            taker.in_channels = small[given]
        elif given:
            taker.in_channels = [small[dim] for dim in given]


def shrink_segmentor(model: ConfigDict) -> None:
    for key in ('decode_head', 'auxiliary_head'):
        if 'channels' in model.get(key, {}):
            model[key].channels = 8
    if model.test_cfg.get('mode') == 'slide':
        model.test_cfg.update(crop_size=(SIDE, SIDE), stride=(96, 96))


def fit_classes(detector: ConfigDict) -> None:
    count = len(CLASSES)
    replace(
        detector,
        dict(
            num_classes=count,
            num_things_classes=count,
            class_weight=[1.0] * count + [0.1],
        ),
    )


def use_data(cfg: Config, scenes: Path, ade: Path) -> None:
    """Point the config to the small data, in the layout that it expects."""
    for name, split in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        loader = cfg[f'{name}_dataloader']
        loader.update(num_workers=0, persistent_workers=False, batch_size=2)
        dataset = loader.dataset
        if dataset.type.split('.')[-1] == 'DemoScenes':
            dataset.update(data_root=str(scenes), counts=COUNTS)
        elif dataset.type == 'UnlabelledImages':
            dataset.data_root = str(scenes)
            dataset.data_prefix.img_path = f'images/{split}'
        elif dataset.type == 'CocoDataset':
            dataset.update(
                data_root=str(scenes),
                ann_file=f'annotations/{split}.json',
                data_prefix=dict(img=f'images/{split}'),
                metainfo=dict(classes=CLASSES),
            )
        else:
            dataset.data_root = str(ade)
        replace(dataset.pipeline, PICTURE_SIZES)
        evaluator = cfg.get(f'{name}_evaluator', {})
        if 'ann_file' in evaluator:
            evaluator.ann_file = str(scenes / 'annotations' / f'{split}.json')


def inherited(recipe: str, tmp_path: Path) -> Config:
    """Inherit as a user does from elsewhere, where MMEngine keeps track of scopes."""
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = 'mmcnv2::{recipe}'\n")
    # Runners print the config several times, and laying it out nicely takes seconds.
    return Config(Config.fromfile(path).to_dict(), format_python_code=False)


def small(recipe: str, tmp_path: Path, scenes: Path, ade: Path) -> Config:
    """Return the config, made to run one step within a second or two."""
    cfg = inherited(recipe, tmp_path)
    shrink_model(cfg.model)
    use_data(cfg, scenes, ade)
    shorten(cfg, tmp_path)
    return cfg


def shorten(cfg: Config, tmp_path: Path) -> None:
    """Make training end after a step or two, on any machine."""
    cfg.work_dir = str(tmp_path)
    # By its name and the second it starts in, MMEngine would take one for another.
    cfg.experiment_name = tmp_path.name
    cfg.randomness = dict(seed=0)
    # MMEngine's mixed precision needs an accelerator.
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('accumulative_counts', None)
    for hook in cfg.default_hooks.values():
        hook.pop('save_best', None)
    # A schedule may begin only before training ends, and a step has to be seen.
    if isinstance(cfg.param_scheduler, dict):
        cfg.param_scheduler = [cfg.param_scheduler]
    for scheduler in cfg.param_scheduler:
        scheduler.begin = 0
        if 'start_factor' in scheduler:
            scheduler.start_factor = 1.0
    if cfg.train_cfg.get('type') == 'IterBasedTrainLoop':
        cfg.train_cfg.update(max_iters=2, val_interval=2)
    else:
        cfg.train_cfg.update(max_epochs=1, val_interval=1)


def metafiles() -> list[dict]:
    """Load those that the model index names."""
    root = CONFIGS.parent
    names = yaml.safe_load((root / 'model-index.yml').read_text())['Import']
    assert names == sorted(names)
    return [yaml.safe_load((root / name).read_text()) for name in names]


def check_schedule(model: dict) -> None:
    """Compare what a metafile tells of a model with its config."""
    train_cfg = Config.fromfile(CONFIGS.parent / model['Config']).train_cfg
    length = dict(Epochs='max_epochs', Iterations='max_iters')
    told = {length[k]: n for k, n in model['Metadata'].items() if k in length}
    assert told, model['Name']
    assert all(train_cfg[name] == number for name, number in told.items())
