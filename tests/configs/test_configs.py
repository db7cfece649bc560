"""Every config is built, trains a step and predicts, on pictures of 128 pixels."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmcnv2.datasets.demo_scenes import CLASSES, make_demo_scenes

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
RECIPES = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob('*.py')
    if '_base_' not in path.parts
)
DIMS = [8, 8, 16, 16]
SIDE = 128
COUNTS = dict(train=4, val=2, unlabelled=4)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return make_demo_scenes(tmp_path_factory.mktemp('scenes') / 'root', counts=COUNTS)


@pytest.fixture(scope='module')
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


def shrink_transforms(node):
    """Make every size in a pipeline small."""
    if isinstance(node, dict):
        for key in ('scale', 'crop_size'):
            if key in node:
                node[key] = (SIDE, SIDE)
        node = list(node.values())
    if isinstance(node, list | tuple):
        for child in node:
            shrink_transforms(child)


def shrink_model(model: ConfigDict) -> None:
    """Make the backbone small, start it at random, and fit the heads to it."""
    model.backbone.arch = dict(depths=(1, 1, 1, 1), dims=DIMS)
    model.backbone.init_cfg = None
    if 'decode_head' in model:
        shrink_segmentor(model)
    if 'roi_head' in model:
        shrink_detector(model)


def shrink_segmentor(model: ConfigDict) -> None:
    model.data_preprocessor.size = (SIDE, SIDE)
    model.decode_head.in_channels = DIMS
    model.auxiliary_head.in_channels = DIMS[2]
    for head in (model.decode_head, model.auxiliary_head):
        head.channels = 8
    if model.test_cfg.get('mode') == 'slide':
        model.test_cfg.update(crop_size=(SIDE, SIDE), stride=(96, 96))


def shrink_detector(model: ConfigDict) -> None:
    model.neck.in_channels = DIMS
    model.roi_head.bbox_head.num_classes = len(CLASSES)
    model.roi_head.mask_head.num_classes = len(CLASSES)
    # So that a network that has learnt nothing detects something.
    model.test_cfg.rcnn.score_thr = 0.0


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
        shrink_transforms(dataset.pipeline)
        evaluator = cfg.get(f'{name}_evaluator', {})
        if 'ann_file' in evaluator:
            evaluator.ann_file = str(scenes / 'annotations' / f'{split}.json')


def small(recipe: str, tmp_path: Path, scenes: Path, ade: Path) -> Config:
    """Return the config, made to run one step within a second or two."""
    cfg = Config.fromfile(CONFIGS / recipe)
    shrink_model(cfg.model)
    use_data(cfg, scenes, ade)
    cfg.work_dir = str(tmp_path)
    # MMEngine's mixed precision needs an accelerator.
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('accumulative_counts', None)
    for hook in cfg.default_hooks.values():
        hook.pop('save_best', None)
    if cfg.train_cfg.get('type') == 'IterBasedTrainLoop':
        cfg.train_cfg.update(max_iters=2, val_interval=2)
    else:
        cfg.train_cfg.update(max_epochs=1, val_interval=1)
        # A schedule may begin only before training ends.
        for scheduler in cfg.param_scheduler:
            scheduler.begin = 0
    return cfg


@pytest.mark.parametrize('recipe', RECIPES)
def test_trains_and_predicts(recipe, tmp_path, scenes, ade):
    cfg = small(recipe, tmp_path, scenes, ade)
    init_default_scope(cfg.default_scope)
    runner = Runner.from_cfg(cfg)
    before = {k: v.clone() for k, v in runner.model.backbone.named_parameters()}
    runner.train()

    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    after = dict(runner.model.backbone.named_parameters())
    assert all((after[key] != before[key]).any() for key in after)
    # The validation after training has predicted, and left its scores.
    scores = [k for k in runner.message_hub.log_scalars if k.startswith('val/')]
    assert {'val/coco/segm_mAP', 'val/mIoU', 'val/fcmae/psnr'} & set(scores)


def recipe(name: str) -> Config:
    return Config.fromfile(CONFIGS / name)


@pytest.mark.parametrize('arch', ['tiny', 'base'])
def test_mask_rcnn_is_the_published_recipe(arch):
    cfg = recipe(f'mask_rcnn/mask-rcnn_convnextv2-{arch}_fpn_lsj-3x_coco.py')
    wrapper, loader = cfg.optim_wrapper, cfg.train_dataloader
    assert cfg.model.backbone.arch == arch
    assert cfg.model.backbone.drop_path_rate == 0.4
    assert (
        f'convnext-v2-{arch}_3rdparty-fcmae' in cfg.model.backbone.init_cfg.checkpoint
    )
    assert cfg.model.test_cfg.rcnn.nms.type == 'soft_nms'
    assert wrapper.type == 'AmpOptimWrapper'
    assert wrapper.optimizer == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    )
    assert wrapper.paramwise_cfg == dict(decay_rate=0.95, decay_type='layer_wise')
    assert loader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 32
    assert cfg.train_cfg.max_epochs == 36
    warmup, steps = cfg.param_scheduler
    assert (warmup.end, steps.milestones) == (1000, [27, 33])
    resize, crop = loader.dataset.pipeline[2:4]
    assert (resize.scale, resize.ratio_range) == ((1024, 1024), (0.1, 2.0))
    assert (crop.type, crop.crop_size) == ('RandomCrop', (1024, 1024))


@pytest.mark.parametrize('arch', ['tiny', 'base'])
def test_upernet_is_the_published_recipe(arch):
    cfg = recipe(f'upernet/upernet_convnextv2-{arch}_160k_ade20k-512x512.py')
    wrapper = cfg.optim_wrapper
    assert cfg.model.backbone.arch == arch
    assert cfg.model.backbone.drop_path_rate == 0.4
    assert (
        f'convnext-v2-{arch}_3rdparty-fcmae' in cfg.model.backbone.init_cfg.checkpoint
    )
    assert cfg.model.test_cfg.mode == 'slide'
    assert cfg.model.decode_head.num_classes == 150
    assert wrapper.type == 'AmpOptimWrapper'
    assert wrapper.optimizer == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    )
    assert wrapper.paramwise_cfg == dict(decay_rate=0.9, decay_type='stage_wise')
    assert cfg.train_dataloader.batch_size * 8 == 16
    assert cfg.train_cfg.max_iters == 160000
    warmup, poly = cfg.param_scheduler
    assert (warmup.end, poly.power, poly.eta_min) == (1500, 1.0, 0.0)
