"""Every config is built, trains a step and predicts, on pictures of 128 pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
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
from .conftest import CONFIGS, shrink_model, small

RECIPES = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob('*.py')
    if '_base_' not in path.parts
)


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
    same = [key for key in after if torch.equal(after[key], before[key])]
    assert not same
    # The validation after training has predicted, and left its scores.
    scores = [k for k in runner.message_hub.log_scalars if k.startswith('val/')]
    assert {'val/coco/bbox_mAP', 'val/mIoU', 'val/fcmae/psnr'} & set(scores)


@pytest.mark.parametrize(
    'recipe', [each for each in RECIPES if 'upernet' in each or 'ade20k' in each]
)
def test_test_time_augmentation_is_built(recipe, tmp_path):
    """Inherited too, where MMEngine would look for each transform in our scope."""
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = 'mmcnv2::{recipe}'\n")
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    assert len(Compose(cfg.tta_pipeline).transforms) == 2


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
    assert tuple(cfg.model.neck.in_channels) == ARCHITECTURES[arch]['dims']
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
    assert tuple(cfg.model.decode_head.in_channels) == ARCHITECTURES[arch]['dims']
    assert cfg.model.auxiliary_head.in_channels == ARCHITECTURES[arch]['dims'][2]
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


@pytest.mark.parametrize(
    ('name', 'rate'),
    [
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
    assert len(spared) == 2 * (4 + 4 + 4 + 4)
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
    root = CONFIGS.parent
    index = yaml.safe_load((root / 'model-index.yml').read_text())
    listed = []
    for name in index['Import']:
        metafile = yaml.safe_load((root / name).read_text())
        collections = {each['Name']: each for each in metafile['Collections']}
        assert all((root / each['README']).is_file() for each in collections.values())
        for model in metafile['Models']:
            assert model['In Collection'] in collections
            assert model['Name'] == Path(model['Config']).stem
            listed.append(model['Config'].removeprefix('configs/'))
    assert sorted(listed) == [r for r in RECIPES if not r.startswith('demo/')]
