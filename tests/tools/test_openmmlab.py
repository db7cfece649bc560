"""Our demos under MMDetection's and MMSegmentation's own tools and inferencers."""

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import cv2
import mmdet
import mmseg
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmseg.apis import MMSegInferencer

from mmcnv2.datasets.demo_scenes import (
    CLASSES,
    PALETTE,
    SEMANTIC_CLASSES,
    SEMANTIC_PALETTE,
    make_demo_scenes,
)

from ..test_docs import python_blocks

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs' / 'demo'
COUNTS = dict(train=2, val=1, unlabelled=0)
DETECTOR = 'mask-rcnn_convnextv2-atto_fpn_demo.py'
SEGMENTOR = 'upernet_convnextv2-atto_demo.py'
METAINFO = {
    DETECTOR: (CLASSES, PALETTE),
    SEGMENTOR: (SEMANTIC_CLASSES, SEMANTIC_PALETTE),
}


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return make_demo_scenes(tmp_path_factory.mktemp('scenes') / 'root', counts=COUNTS)


def of_scenes(scenes):
    """Give the settings with which a demo trains on the scenes."""
    return [
        setting
        for split in ('train', 'val', 'test')
        for setting in (
            f'{split}_dataloader.dataset.data_root={scenes}',
            *(
                f'{split}_dataloader.dataset.counts.{key}={value}'
                for key, value in COUNTS.items()
            ),
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
        )
    ]


def train(library, config, scenes, work_dir, *options):
    """Train through the library's own ``tools/train.py``."""
    tool = Path(library.__file__).parent / '.mim' / 'tools' / 'train.py'
    command = [sys.executable, tool, CONFIGS / config, '--work-dir', work_dir]
    subprocess.run(
        [*map(str, command), '--cfg-options', *of_scenes(scenes), *options],
        check=True,
        cwd=work_dir,
    )


def picture_of(scenes):
    (path,) = (scenes / 'images' / 'val').iterdir()
    return path


def test_mmdetection(scenes, tmp_path):
    annotations = scenes / 'annotations' / 'val.json'
    options = [
        'train_cfg.max_epochs=1',
        f'val_evaluator.ann_file={annotations}',
        f'test_evaluator.ann_file={annotations}',
    ]
    train(mmdet, DETECTOR, scenes, tmp_path, *options)
    inferencer = DetInferencer(
        str(CONFIGS / DETECTOR), str(tmp_path / 'epoch_1.pth'), device='cpu'
    )
    weights = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['state_dict']
    for name, value in inferencer.model.state_dict().items():
        assert torch.equal(value, weights[name]), name

    out = inferencer(str(picture_of(scenes)), out_dir=str(tmp_path), pred_score_thr=0.0)
    (prediction,) = out['predictions']
    assert prediction['labels']
    assert set(prediction['labels']) <= set(range(len(CLASSES)))
    assert np.isfinite(prediction['scores']).all()
    assert cv2.imread(str(tmp_path / 'vis' / picture_of(scenes).name)) is not None
    assert inferencer.visualizer.dataset_meta['classes'] == CLASSES


@pytest.mark.skipif(
    'mmsegmentation' not in {each.name for each in distributions()},
    reason="the onedl fork's own tools do not find bases that start with mmseg::",
)
def test_mmsegmentation(scenes, tmp_path):
    options = ['train_cfg.max_iters=2', 'default_hooks.checkpoint.interval=2']
    train(mmseg, SEGMENTOR, scenes, tmp_path, *options)
    inferencer = MMSegInferencer(
        str(CONFIGS / SEGMENTOR), str(tmp_path / 'iter_2.pth'), device='cpu'
    )
    out = inferencer(str(picture_of(scenes)), out_dir=str(tmp_path), show=False)
    assert out['predictions'].shape == (256, 256)
    assert set(np.unique(out['predictions'])) <= set(range(len(CLASSES) + 1))
    assert cv2.imread(str(tmp_path / 'vis' / picture_of(scenes).name)) is not None


def test_readme(scenes, tmp_path, monkeypatch):
    """Its lines run as they stand, on weights that have learnt nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'demo_scenes').symlink_to(scenes)
    for config, checkpoint in ((DETECTOR, 'epoch_12'), (SEGMENTOR, 'iter_800')):
        cfg = Config.fromfile(CONFIGS / config)
        init_default_scope(cfg.default_scope)
        weights = MODELS.build(cfg.model).state_dict()
        classes, palette = METAINFO[config]
        meta = dict(dataset_meta=dict(classes=classes, palette=palette))
        name = config.replace('_demo.py', '_fcmae-pretrained_demo')
        path = tmp_path / 'work_dirs' / name / f'{checkpoint}.pth'
        path.parent.mkdir(parents=True)
        torch.save({'state_dict': weights, 'meta': meta}, path)
    (block,) = [each for each in python_blocks('README.md') if 'DetInferencer' in each]
    names = {}
    exec(block, names)
    assert names['maps'].shape == (256, 256)
    assert len(names['found']) == 1
    for folder in ('detections', 'maps'):
        painted = tmp_path / folder / 'vis' / picture_of(scenes).name
        assert cv2.imread(str(painted)).shape == (256, 256, 3)
