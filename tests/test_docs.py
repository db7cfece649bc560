"""What the documents show is built as it stands there."""

import inspect
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine._strategy import BaseStrategy  # noqa: F401
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, STRATEGIES, init_default_scope
from torch import nn

from mmcnv2.engine import PretrainedBackbone
from mmcnv2.engine.conversion import convert_weights
from mmcnv2.models import ARCHITECTURES, ConvNeXtV2

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    page.relative_to(ROOT).as_posix()
    for folder in ('', 'docs', 'configs/*')
    for page in sorted(ROOT.glob(str(Path(folder, '*.md'))))
]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


def python_blocks(document: str) -> list[str]:
    return blocks(document, 'python')


def laid_over(tmp_path: Path, *layers: str) -> Config:
    """Read configs, each of which inherits from the one before."""
    for i, text in enumerate(layers):
        base = f"_base_ = './layer{i - 1}.py'\n" if i else ''
        (tmp_path / f'layer{i}.py').write_text(base + text)
    cfg = Config.fromfile(tmp_path / f'layer{len(layers) - 1}.py')
    init_default_scope(cfg.default_scope)
    return cfg


def build(cfg: Config) -> nn.Module:
    """Build the model without memory, and so whatever its size."""
    with torch.device('meta'):
        return MODELS.build(cfg.model)


DETECTOR, SEGMENTOR, START, LEARNING, SIZE = python_blocks('docs/own_data.md')
PRETRAINING, GREY, STATISTICS = python_blocks('docs/pretrain.md')


@pytest.mark.parametrize('block', [DETECTOR, SEGMENTOR], ids=['detector', 'segmentor'])
def test_own_data(block, tmp_path):
    cfg = laid_over(tmp_path, block)
    model = build(cfg)
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == 'data/nuclei/'
        assert 'nucleus' in dataset.metainfo.classes
    if cfg.default_scope == 'mmdet':
        heads = (model.roi_head.bbox_head, model.roi_head.mask_head)
        assert cfg.val_evaluator.ann_file == 'data/nuclei/annotations/val.json'
        assert {head.num_classes for head in heads} == {1}
    else:
        assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 2
        assert 'reduce_zero_label' not in str(cfg.train_dataloader)


@pytest.mark.parametrize('block', [DETECTOR, SEGMENTOR], ids=['detector', 'segmentor'])
def test_own_start_and_learning(block, tmp_path):
    cfg = laid_over(tmp_path, block, START, LEARNING)
    start = cfg.model.backbone.init_cfg
    assert start.checkpoint == 'work_dirs/my_pretraining/epoch_800.pth'
    assert start.prefix == 'backbone.'
    model = build(cfg)
    frozen = {k for k, v in model.backbone.named_parameters() if not v.requires_grad}
    assert 'stages.0.2.pwconv1.weight' in frozen
    assert not [name for name in frozen if name.startswith('stages.1')]
    cfg.optim_wrapper.type = 'OptimWrapper'
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rates = {group['lr'] for group in groups}
    assert max(rates) == 1e-4
    assert len(rates) > 3
    assert all(rate == pytest.approx(1e-4 * 0.8 ** steps(rate)) for rate in rates)


def steps(rate: float) -> int:
    return round(math.log(rate / 1e-4, 0.8))


def test_own_size(tmp_path):
    cfg = laid_over(tmp_path, DETECTOR, SIZE)
    assert build(cfg).backbone.dims == (40, 80, 160, 320)
    start = cfg.model.backbone.init_cfg
    assert (start.type, start.prefix) == ('Pretrained', 'backbone.')
    assert 'convnext-v2-atto_3rdparty-fcmae' in start.checkpoint


def test_own_pictures_without_labels(tmp_path):
    cfg = laid_over(tmp_path, PRETRAINING)
    build(cfg)
    assert cfg.model.neck.init_cfg is None
    for split, folder in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == 'data/nuclei/'
        assert dataset.data_prefix == dict(img_path=f'images/{folder}/')


def test_own_grey_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pictures = np.random.default_rng(0).integers(0, 255, (4, 40, 50), np.uint8)
    for i, picture in enumerate(pictures):
        folder = Path('data', 'nuclei', 'images', 'val' if i == 3 else 'train')
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f'{i}.png'), picture)
    exec(STATISTICS, {})
    mean, std = map(float, capsys.readouterr().out.split())
    assert mean == pytest.approx(pictures[:3].mean())
    assert std == pytest.approx(pictures[:3].std())

    cfg = laid_over(tmp_path, PRETRAINING, GREY)
    cfg.model.backbone.arch = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    batch = pseudo_collate([dataset[i] for i in range(3)])
    assert batch['inputs'][0].shape == (1, 224, 224)
    assert model.train_step(batch, wrapper)['loss'].isfinite()
    (sample,) = [*DATASETS.build(cfg.val_dataloader.dataset)]
    (found,) = model.eval().test_step(pseudo_collate([sample]))
    torch.testing.assert_close(found.picture, sample['inputs'].float())


@pytest.fixture
def official(tmp_path, monkeypatch) -> dict[str, torch.Tensor]:
    """Save tiny's classifier under its official name, without memory."""
    with torch.device('meta'):
        weights = ConvNeXtV2('tiny', out_indices=(3,)).state_dict()
        weights['head.weight'] = torch.empty(1000, 768)
        weights['head.bias'] = torch.empty(1000)
    for name in ('weight', 'bias'):
        weights[f'norm.{name}'] = weights.pop(f'norm3.{name}')
    monkeypatch.chdir(tmp_path)
    torch.save({'model': weights}, 'convnextv2_tiny_1k_224_ema.pt')
    return weights


def test_checkpoints(official, tmp_path, log):
    recipe = "_base_ = 'mmcnv2::mask_rcnn/mask-rcnn_convnextv2-tiny_fpn_lsj-3x_coco.py'"
    line, converted = blocks('docs/checkpoints.md', 'text')
    for block in python_blocks('docs/checkpoints.md'):
        cfg = laid_over(tmp_path, recipe, block)
        start = dict(cfg.model.backbone.init_cfg)
        assert start.pop('type') == 'Pretrained'
        PretrainedBackbone(**start)(build(cfg).backbone)
    said = [each for each in log.messages if each.startswith('Backbone')]
    assert said == [line.strip()] * 2
    assert str(convert_weights(official, 'ours')) == converted.strip()


def test_deepspeed(tmp_path):
    (block,) = python_blocks('docs/many_gpus.md')
    cfg = laid_over(tmp_path, block)
    assert STRATEGIES.get(cfg.strategy.type).__name__ == 'DeepSpeedStrategy'
    groups = build_optim_wrapper(build(cfg), cfg.optim_wrapper).optimizer.param_groups
    assert {group['weight_decay'] for group in groups} == {0.0, 0.05}
    # The paper's rate for as many pictures.
    (rate,) = {group['lr'] for group in groups}
    assert rate == pytest.approx(1.5e-4 * cfg.auto_scale_lr.base_batch_size / 256)


def test_sparse_encoding():
    (block,) = python_blocks('docs/sparse_encoding.md')
    shapes = re.findall(r'^\((\w+),\) = .*# (\(.*\))$', block, re.MULTILINE)
    names = {}
    exec(block, names)
    assert {name: str(tuple(names[name].shape)) for name, _ in shapes} == dict(shapes)
    assert len(shapes) == 2


def test_pictures_of_four_channels_and_16_bits(tmp_path):
    blocks = python_blocks('configs/fcmae/README.md')
    (block,) = [each for each in blocks if 'in_channels' in each]
    base = "_base_ = 'mmcnv2::fcmae/fcmae_convnextv2-atto_800e_imagenet.py'"
    model = MODELS.build(laid_over(tmp_path, base, block).model).eval()
    pictures = np.random.default_rng(0).integers(0, 4096, (1, 4, 64, 64), np.uint16)
    batch = model.data_preprocessor({'inputs': torch.from_numpy(pictures)})
    (found,) = model(batch['inputs'], mode='predict')
    np.testing.assert_allclose(found.picture, pictures[0], atol=0.01)
    assert found.data_range == 4095


def test_readme_table_is_the_architecture_table():
    rows = re.findall(
        r'^\| (\w+) \| ([\d ]+) \| ([\d ]+) \|',
        (ROOT / 'README.md').read_text(),
        re.MULTILINE,
    )
    table = {
        name: dict(
            depths=tuple(map(int, depths.split())), dims=tuple(map(int, dims.split()))
        )
        for name, depths, dims in rows
    }
    assert table == ARCHITECTURES


def test_readme_swaps_the_backbone(tmp_path):
    swap, learning, *_ = python_blocks('README.md')
    assert 'mmcnv2.ConvNeXtV2' in swap
    base = "_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'\n"
    cfg = laid_over(tmp_path, base, swap, learning)
    model = build(cfg)
    assert type(model.backbone).__name__ == 'ConvNeXtV2'
    assert [conv.in_channels for conv in model.neck.lateral_convs] == [
        96,
        192,
        384,
        768,
    ]
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert type(optimizer) is torch.optim.AdamW
    groups = optimizer.param_groups
    # Six below the neck and the heads, with and without weight decay.
    assert {group['lr'] for group in groups} == {1e-4 * 0.95**i for i in range(8)}
    assert {group['weight_decay'] for group in groups} == {0.0, 0.05}


def test_arguments_of_the_backbone():
    page = (ROOT / 'docs' / 'any_model.md').read_text()
    (table,) = re.findall(r'## Its arguments\n(.*?)\n## ', page, re.DOTALL)
    told = re.findall(r'^\| `(\w+)`', table, re.MULTILINE)
    assert told == [*inspect.signature(ConvNeXtV2).parameters]


def test_official_checkpoints():
    """Those of the page are those that the recipes take."""
    address = r'https://[^\s\')]*convnext-v2[^\s\')]*'
    page = (ROOT / 'docs' / 'checkpoints.md').read_text()
    recipes = [path.read_text() for path in (ROOT / 'configs').rglob('*.py')]
    assert {*re.findall(address, page)} == {*re.findall(address, ''.join(recipes))}


def test_index_lists_every_page():
    linked = re.findall(
        r'^\| \[.*?\]\((.*?)\)', (ROOT / 'docs' / 'README.md').read_text(), re.MULTILINE
    )
    pages = {page.name for page in (ROOT / 'docs').glob('*.md')} - {'README.md'}
    assert set(linked) == pages
    assert len(linked) == len(pages)


@pytest.mark.parametrize('page', PAGES)
def test_links(page):
    """What is linked is there, down to its headings."""
    folder = (ROOT / page).parent
    for link in re.findall(r'\]\((?!https?:)([^)]+)\)', (ROOT / page).read_text()):
        path, _, heading = link.partition('#')
        target = folder / path if path else ROOT / page
        assert target.exists(), link
        if heading:
            headings = re.findall(r'^#+ (.*)$', target.read_text(), re.MULTILINE)
            anchors = [re.sub(r'[^\w -]', '', each.lower()) for each in headings]
            assert heading in [each.replace(' ', '-') for each in anchors], link
