"""A tiny data set, a detector and a segmentor that the tools train within seconds."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from ..commands import run_tool

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess]

COMMON = """
custom_imports = dict(imports=['mmcnv2'])
backbone = dict(
    _delete_=True, type='mmcnv2.ConvNeXtV2',
    arch=dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)))
randomness = dict(seed=0)
"""

DETECTION = """
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
{common}
model = dict(
    backbone=backbone,
    neck=dict(in_channels=[8, 8, 16, 16], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=1),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(
            num_convs=1, in_channels=16, conv_out_channels=16, num_classes=1)),
    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=5)))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 64), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=(
        'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
dataset = dict(
    type='CocoDataset', data_root='{data}', ann_file='instances.json',
    data_prefix=dict(img='pictures'), metainfo=dict(classes=('box',)),
    pipeline=train_pipeline)
train_dataloader = dict(
    batch_size=1, num_workers=0, dataset=dataset,
    sampler=dict(type='DefaultSampler', shuffle=True))
test_dataloader = dict(
    batch_size=1, num_workers=0,
    dataset=dict(dataset, test_mode=True, pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False))
test_evaluator = dict(
    type='CocoMetric', ann_file='{data}/instances.json', metric=['bbox', 'segm'])
test_cfg = dict(type='TestLoop')
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(logger=dict(interval=1))
"""

SEGMENTATION = """
_base_ = ['mmseg::_base_/models/fcn_r50-d8.py', 'mmseg::_base_/default_runtime.py']
{common}
model = dict(
    pretrained=None,
    backbone=dict(backbone, out_indices=(3,)),
    data_preprocessor=dict(size=(64, 96)),
    decode_head=dict(
        in_channels=16, in_index=0, channels=8, num_convs=1, num_classes=2,
        norm_cfg=None, dropout_ratio=0.0),
    auxiliary_head=None)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
        [dict(type='LoadAnnotations')],
        [dict(type='PackSegInputs')]])]
dataset = dict(
    type='BaseSegDataset', data_root='{data}', img_suffix='.png',
    data_prefix=dict(img_path='pictures', seg_map_path='maps'),
    metainfo=dict(classes=('floor', 'box'), palette=[[0, 0, 0], [255, 0, 0]]),
    pipeline=train_pipeline)
train_dataloader = dict(
    batch_size=2, num_workers=0, dataset=dataset,
    sampler=dict(type='InfiniteSampler', shuffle=True))
test_dataloader = dict(
    batch_size=1, num_workers=0, dataset=dataset,
    sampler=dict(type='DefaultSampler', shuffle=False))
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_cfg = dict(type='TestLoop')
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4)
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
    visualization=dict(type='SegVisualizationHook'))
"""

PRETRAINING = """
_base_ = [
    'mmcnv2::_base_/models/fcmae_convnextv2-tiny.py',
    'mmcnv2::_base_/fcmae_runtime.py']
custom_imports = dict(imports=['mmcnv2', 'recorder'])
custom_hooks = [dict(type='mmengine.Recorder')]
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))),
    neck=dict(decoder_dim=16))
train_dataloader = dict(
    batch_size=1, num_workers=0,
    dataset=dict(
        type='UnlabelledImages', data_root='{data}',
        data_prefix=dict(img_path='pictures'),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackPretrainInputs')]),
    sampler=dict(type='DefaultSampler', shuffle=True))
test_dataloader = dict(
    train_dataloader, sampler=dict(type='DefaultSampler', shuffle=False))
test_evaluator = dict(type='ReconstructionMetric')
test_cfg = dict()
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
optim_wrapper = dict(
    type='OptimWrapper', accumulative_counts=2, optimizer=dict(type='SGD', lr=1e-3))
auto_scale_lr = dict(base_batch_size=8)
"""

# Each process writes down what it has seen, and the weights that it ends with.
RECORDER = """
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Recorder(Hook):
    def before_train(self, runner):
        model = runner.model
        self.model = model.module if is_model_wrapper(model) else model
        self.pictures, self.masks = [], []
        self.start = self.weights()
        self.model.backbone.register_forward_pre_hook(self.record)

    def weights(self):
        return {k: v.clone() for k, v in self.model.state_dict().items()}

    def record(self, backbone, args):
        self.masks.append(args[1])

    def before_train_iter(self, runner, batch_idx, data_batch):
        self.pictures += [each.img_path for each in data_batch['data_samples']]

    def after_train(self, runner):
        seen = dict(pictures=self.pictures, masks=self.masks)
        weights = dict(start=self.start, end=self.weights())
        torch.save(seen | weights, f'{runner.work_dir}/process_{get_rank()}.pt')
"""


def draw(folder: Path, count: int = 4) -> None:
    """Draw boxes on floors, with their instances and label maps."""
    generator = np.random.default_rng(0)
    for name in ('pictures', 'maps'):
        (folder / name).mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        picture = generator.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        x, y = (int(edge) for edge in generator.integers(0, 32, 2))
        label = np.zeros((64, 96), np.uint8)
        label[y : y + 32, x : x + 32] = 1
        picture[label == 1] = 200
        cv2.imwrite(str(folder / 'pictures' / f'{i}.png'), picture)
        cv2.imwrite(str(folder / 'maps' / f'{i}.png'), label)
        corners = [x, y, x + 32, y, x + 32, y + 32, x, y + 32]
        images.append({'id': i, 'file_name': f'{i}.png', 'height': 64, 'width': 96})
        annotations.append(
            {'id': i + 1, 'image_id': i, 'category_id': 1, 'iscrowd': 0}
            | {'bbox': [x, y, 32, 32], 'area': 1024, 'segmentation': [corners]}
        )
    categories = [{'id': 1, 'name': 'box'}]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    (folder / 'instances.json').write_text(json.dumps(content))


@pytest.fixture(scope='session')
def tools_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold ``det.py``, ``seg.py`` and ``fcmae.py``, a config each, and their data."""
    folder = tmp_path_factory.mktemp('tools')
    draw(folder / 'data')
    templates = {'det': DETECTION, 'seg': SEGMENTATION, 'fcmae': PRETRAINING}
    for name, template in templates.items():
        text = template.format(common=COMMON, data=folder / 'data')
        (folder / f'{name}.py').write_text(text)
    (folder / 'recorder.py').write_text(RECORDER)
    return folder


def run_script(
    command: list[str], cwd: Path, modules: list[str]
) -> subprocess.CompletedProcess:
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    return subprocess.run(
        ['bash', *command],
        env={**os.environ, 'PATH': path, 'PYTHONPATH': os.pathsep.join(modules)},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope='session')
def run(tools_folder: Path) -> Run:
    """Run a tool in the folder above, and fail with its output if it fails."""

    def run(
        tool: str, *args: object, processes: int = 1, fails: bool = False
    ) -> subprocess.CompletedProcess:
        command = [str(ROOT / 'tools' / tool), *map(str, args)]
        if processes > 1:
            command += ['--launcher', 'pytorch']
        # The checkout of these tests, whichever is installed.
        modules = [str(tools_folder), str(ROOT)]
        if tool.endswith('.py'):
            result = run_tool(command, tools_folder, modules, processes)
        else:
            result = run_script(command, tools_folder, modules)
        # Why it failed comes last, and much may come before.
        assert (result.returncode != 0) == fails, result.stdout[-4000:]
        return result

    return run


@pytest.fixture
def run_here(
    tools_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Run a tool in this process, which is quick for one that stops at once."""

    def run_here(tool: str, *args: str) -> None:
        monkeypatch.chdir(tools_folder)
        monkeypatch.syspath_prepend(tools_folder)
        monkeypatch.setattr(sys, 'argv', [tool, *args])
        monkeypatch.setenv('LOCAL_RANK', '0')
        runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')

    return run_here


@pytest.fixture(scope='session')
def trained(run: Run, tools_folder: Path) -> dict[str, Path]:
    """Train both, without a work dir named, and return their last checkpoints."""
    run('train.py', 'det.py', '--auto-scale-lr')
    run('train.py', 'seg.py')
    work_dirs = tools_folder / 'work_dirs'
    return {
        'det': work_dirs / 'det' / 'epoch_1.pth',
        'seg': work_dirs / 'seg' / 'iter_4.pth',
    }
