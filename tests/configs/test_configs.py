"""Every config is built, trains a step and predicts, on pictures of 128 pixels.

Those for classification have a file of their own, since they need mmpretrain.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine import registry as roots
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmcnv2.models import ARCHITECTURES
from mmcnv2.models.layers import GRN
from mmcnv2.registry import MODELS

from ..conftest import needs_minkowski
from .conftest import (
    ALL_RECIPES,
    CONFIGS,
    Start,
    check_schedule,
    inherited,
    metafiles,
    shrink_model,
    small,
)

RECIPES = [each for each in ALL_RECIPES if not each.startswith('classification/')]


@pytest.mark.parametrize('recipe', RECIPES)
def test_trains_and_predicts(recipe, tmp_path, scenes, ade):
    cfg = small(recipe, tmp_path, scenes, ade)
    init_default_scope(cfg.default_scope)
    runner = Runner.from_cfg(cfg)
    start = Start()
    runner.register_hook(start)
    runner.train()

    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    unmoved = start.unmoved(runner.model)
    assert not [name for name in unmoved if name.startswith('backbone.')]
    # The validation after training has predicted, and left its scores.
    scores = [k for k in runner.message_hub.log_scalars if k.startswith('val/')]
    assert {'val/coco/bbox_mAP', 'val/mIoU', 'val/fcmae/psnr'} & set(scores)


@pytest.mark.parametrize(
    'recipe', [each for each in RECIPES if 'upernet' in each or 'ade20k' in each]
)
def test_test_time_augmentation_is_built(recipe, tmp_path):
    """Inherited too, where MMEngine would look for each transform in our scope."""
    cfg = inherited(recipe, tmp_path)
    init_default_scope(cfg.default_scope)
    assert len(Compose(cfg.tta_pipeline).transforms) == 2


def recipe(name: str) -> Config:
    return Config.fromfile(CONFIGS / name)


def started_from(cfg: Config) -> str:
    return Path(cfg.model.backbone.init_cfg.checkpoint).name


def table(readme: str) -> dict[str, list[str]]:
    """Return the cells behind each link to a config in a folder's README."""
    lines = (CONFIGS / readme / 'README.md').read_text().splitlines()
    rows = [re.fullmatch(r'\| \[.*\]\((.*\.py)\) \|(.*)\|', line) for line in lines]
    return {row[1]: [c.strip() for c in row[2].split('|')] for row in rows if row}


def assert_fits(cfg: Config, arch: str) -> None:
    """The size, its channels and its checkpoint belong together."""
    model, dims = cfg.model, list(ARCHITECTURES[arch]['dims'])
    assert model.backbone.arch == arch
    assert started_from(cfg).startswith(f'convnext-v2-{arch}_')
    assert model.backbone.init_cfg.prefix == 'backbone.'
    assert model.backbone.get('with_cp', False) == (arch == 'huge')
    if cfg.default_scope == 'mmseg':
        assert model.decode_head.in_channels == dims
        assert model.auxiliary_head.in_channels == dims[2]
    else:
        assert model.neck.in_channels == dims


ADAMW = dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_mask_rcnn_lsj(arch):
    """MMDetection's recipe for base; the README says what else there is."""
    name = f'mask-rcnn_convnextv2-{arch}_fpn_lsj-3x_coco.py'
    cfg = recipe(f'mask_rcnn/{name}')
    wrapper, loader = cfg.optim_wrapper, cfg.train_dataloader
    assert_fits(cfg, arch)
    assert '_3rdparty-fcmae_in1k_' in started_from(cfg)
    assert cfg.model.backbone.drop_path_rate == float(table('mask_rcnn')[name][0])
    assert cfg.model.test_cfg.rcnn.nms.type == 'soft_nms'
    assert (wrapper.type, wrapper.optimizer) == ('AmpOptimWrapper', ADAMW)
    assert wrapper.paramwise_cfg == dict(decay_rate=0.95, decay_type='layer_wise')
    assert loader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 32
    assert cfg.train_cfg.max_epochs == 36
    warmup, steps = cfg.param_scheduler
    assert (warmup.end, steps.milestones) == (1000, [27, 33])
    resize, crop = loader.dataset.pipeline[2:4]
    assert (resize.scale, resize.ratio_range) == ((1024, 1024), (0.1, 2.0))
    assert (crop.type, crop.crop_size) == ('RandomCrop', (1024, 1024))


@pytest.mark.parametrize(
    ('folder', 'name', 'epochs', 'milestones'),
    [
        ('mask_rcnn', 'mask-rcnn_convnextv2-{}_fpn_ms-crop-1x_coco.py', 12, [8, 11]),
        (
            'cascade_mask_rcnn',
            'cascade-mask-rcnn_convnextv2-{}_fpn_ms-crop-3x_coco.py',
            36,
            [27, 33],
        ),
    ],
)
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_multi_scale(folder, name, epochs, milestones, arch):
    name = name.format(arch)
    if epochs == 12 and arch in ('base', 'large', 'huge'):
        assert not (CONFIGS / folder / name).exists()
        return
    cfg = recipe(f'{folder}/{name}')
    wrapper = cfg.optim_wrapper
    assert_fits(cfg, arch)
    assert '_3rdparty-fcmae_in1k_' in started_from(cfg)
    assert cfg.model.backbone.drop_path_rate == float(table(folder)[name][0])
    assert (wrapper.type, wrapper.optimizer) == ('AmpOptimWrapper', ADAMW)
    assert wrapper.constructor == 'mmcnv2.LayerDecayOptimWrapperConstructor'
    assert wrapper.paramwise_cfg == dict(decay_rate=0.95, decay_type='layer_wise')
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size
    warmup, steps = cfg.param_scheduler
    assert cfg.train_cfg.max_epochs == steps.end == epochs
    assert (warmup.end, steps.milestones) == (1000, milestones)
    # Nothing is left of the base's own backbone, nor of its checkpoint.
    assert 'mmpretrain' not in str(cfg.to_dict())
    assert '/convnext/' not in str(cfg.to_dict())
    heads = cfg.model.roi_head.bbox_head
    if folder == 'cascade_mask_rcnn':
        assert [head.loss_bbox.type for head in heads] == ['GIoULoss'] * 3


@pytest.mark.parametrize('side', [512, 640])
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_upernet(arch, side):
    name = f'upernet_convnextv2-{arch}_160k_ade20k-{side}x{side}.py'
    if side == 640 and arch not in ('base', 'large', 'huge'):
        assert not (CONFIGS / 'upernet' / name).exists()
        return
    cfg = recipe(f'upernet/{name}')
    wrapper = cfg.optim_wrapper
    assert_fits(cfg, arch)
    labels = 'in21k-pre' if side == 640 else 'pre'
    assert f'_fcmae-{labels}_3rdparty_in1k' in started_from(cfg)
    assert cfg.model.backbone.drop_path_rate == float(table('upernet')[name][0])
    assert (cfg.model.test_cfg.mode, cfg.model.decode_head.num_classes) == (
        'slide',
        150,
    )
    sizes = (cfg.model.test_cfg.crop_size, cfg.model.data_preprocessor.size)
    assert sizes == ((side, side), (side, side))
    assert cfg.train_dataloader.dataset.pipeline[3].crop_size == (side, side)
    assert (wrapper.type, wrapper.optimizer) == ('AmpOptimWrapper', ADAMW)
    assert wrapper.paramwise_cfg == dict(decay_rate=0.9, decay_type='stage_wise')
    assert cfg.train_dataloader.batch_size * 8 == 16
    assert cfg.train_cfg.max_iters == 160000
    warmup, poly = cfg.param_scheduler
    assert (warmup.end, poly.power, poly.eta_min) == (1500, 1.0, 0.0)


@pytest.mark.parametrize(
    ('name', 'rate'),
    [
        ('dino/dino-4scale_convnextv2-tiny_12e_coco.py', 1e-5),
        ('mask2former/mask2former_convnextv2-tiny_50e_coco.py', 1e-5),
        ('mask2former/mask2former_convnextv2-tiny_160k_ade20k-512x512.py', 1e-5),
        ('segformer/segformer-head_convnextv2-tiny_160k_ade20k-512x512.py', 6e-5),
    ],
)
def test_norms_and_grn_are_spared_from_weight_decay(name, rate):
    cfg = recipe(name)
    shrink_model(cfg.model)
    init_default_scope(cfg.default_scope)
    model = roots.MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    groups = {group['params'][0]: group for group in wrapper.optimizer.param_groups}
    spared = {
        param
        for module in model.backbone.modules()
        if isinstance(module, nn.LayerNorm | GRN)
        for param in module.parameters()
    }
    # Output norms are those of the stages that are taken.
    assert len(spared) == 2 * (4 + 4 + 4 + len(model.backbone.out_indices))
    for param in model.backbone.parameters():
        assert groups[param]['lr'] == pytest.approx(rate)
        assert (groups[param]['weight_decay'] == 0) == (param in spared)
    others = set(groups) - set(model.backbone.parameters())
    assert all(groups[each]['lr'] == pytest.approx(10 * rate) for each in others)


@pytest.mark.parametrize(('epochs', 'arch'), [(800, 'atto'), (1600, 'huge')])
def test_fcmae_is_the_published_recipe(epochs, arch):
    cfg = recipe(f'fcmae/fcmae_convnextv2-{arch}_{epochs}e_imagenet.py')
    model, wrapper, loader = cfg.model, cfg.optim_wrapper, cfg.train_dataloader
    assert (model.backbone.arch, model.mask_ratio) == (arch, 0.6)
    assert (model.neck.decoder_dim, model.neck.decoder_depth) == (512, 1)
    assert model.head.norm_pix
    images = 8 * loader.batch_size * wrapper.accumulative_counts
    assert images == cfg.auto_scale_lr.base_batch_size == 4096
    rate = pytest.approx(1.5e-4 * images / 256)
    assert wrapper.optimizer == dict(
        type='AdamW', lr=rate, betas=(0.9, 0.95), weight_decay=0.05
    )
    assert cfg.train_cfg.max_epochs == epochs
    warmup, cosine = cfg.param_scheduler
    assert warmup.end == cosine.begin == 40
    assert cosine.get('eta_min', 0) == 0
    crop = loader.dataset.pipeline[1]
    assert (crop.type, crop.scale) == ('RandomResizedCrop', 224)
    assert crop.crop_ratio_range == (0.2, 1.0)


@pytest.mark.parametrize('arch', ['atto', 'tiny', 'base'])
def test_fcmae_starts_within_the_range_of_bfloat16(arch):
    """``--amp`` takes it, for the paper's initial weights make float16 overflow."""
    cfg = recipe(f'fcmae/fcmae_convnextv2-{arch}_800e_imagenet.py')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(torch.randn(1, 3, 64, 64), mode='loss')['loss']
    loss.backward()
    assert loss.isfinite()
    assert all(param.grad.isfinite().all() for param in model.parameters())


def test_fcmae_validates_on_what_can_be_read(tmp_path, scenes, ade):
    """A broken file, behind all others, changes nothing."""
    shutil.copytree(scenes, tmp_path / 'scenes')
    (tmp_path / 'scenes' / 'images' / 'val' / 'z.jpg').touch()
    found = []
    for root in (scenes, tmp_path / 'scenes'):
        cfg = small('demo/fcmae_convnextv2-atto_demo.py', tmp_path, root, ade)
        init_default_scope(cfg.default_scope)
        runner = Runner.from_cfg(cfg)
        found.append(runner.val())
    assert found[0] == pytest.approx(found[1])
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert 'z.jpg; another one takes its place' in log
    assert '1 of 3 pictures could not be read' in log


def test_fcmae_accumulates_gradients(tmp_path, scenes, ade):
    """One batch of four pictures and two of two, with one step, move weights alike."""
    ends = []
    for batch_size, counts in ((4, 1), (2, 2)):
        folder = tmp_path / str(counts)
        folder.mkdir()
        cfg = small('demo/fcmae_convnextv2-atto_demo.py', folder, scenes, ade)
        cfg.train_dataloader.update(batch_size=batch_size)
        cfg.train_dataloader.sampler.shuffle = False
        cfg.param_scheduler = None
        cfg.optim_wrapper.accumulative_counts = counts
        cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.1, weight_decay=0.0)
        init_default_scope(cfg.default_scope)
        runner = Runner.from_cfg(cfg)
        runner.train()
        ends.append(runner.model.state_dict())
    torch.testing.assert_close(*ends)


@needs_minkowski
def test_minkowski_trains_as_packed_does(tmp_path, scenes, ade):
    ends = []
    for sparse in ('packed', 'minkowski'):
        folder = tmp_path / sparse
        folder.mkdir()
        cfg = small('demo/fcmae_convnextv2-atto_demo.py', folder, scenes, ade)
        cfg.model.backbone.sparse = sparse
        cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.1, weight_decay=0.0)
        init_default_scope(cfg.default_scope)
        runner = Runner.from_cfg(cfg)
        runner.train()
        ends.append(runner.model.state_dict())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_model_index_lists_every_recipe():
    listed = []
    for metafile in metafiles():
        collections = {each['Name']: each for each in metafile['Collections']}
        for model in metafile['Models']:
            config = CONFIGS.parent / model['Config']
            readme = config.parent / 'README.md'
            collection = collections[model['In Collection']]
            assert collection['README'] == f'configs/{readme.parent.name}/README.md'
            assert model['Name'] == config.stem
            assert f']({config.name})' in readme.read_text()
            listed.append(config.relative_to(CONFIGS).as_posix())
    assert sorted(listed) == [r for r in ALL_RECIPES if not r.startswith('demo/')]


def test_metafiles_tell_the_schedules():
    for model in (model for file in metafiles() for model in file['Models']):
        if model['Config'].removeprefix('configs/') in RECIPES:
            check_schedule(model)
