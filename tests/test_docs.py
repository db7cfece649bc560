"""What the documents show is built as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmcnv2.models import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]


def python_blocks(document: str) -> list[str]:
    return re.findall(r'```python\n(.*?)```', (ROOT / document).read_text(), re.DOTALL)


@pytest.mark.parametrize('block', [0, 1])
def test_own_data(block, tmp_path):
    path = tmp_path / 'my_config.py'
    path.write_text(python_blocks('docs/own_data.md')[block])
    cfg = Config.fromfile(path)
    # Nothing is fetched, and a small model is built as quickly as may be.
    cfg.model.backbone.init_cfg = None
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
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


def test_own_pictures_without_labels(tmp_path):
    path = tmp_path / 'my_pretraining.py'
    path.write_text(python_blocks('docs/own_data.md')[2])
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    MODELS.build(cfg.model)
    assert cfg.model.neck.init_cfg is None
    for split, folder in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == 'data/nuclei/'
        assert dataset.data_prefix == dict(img_path=f'images/{folder}/')


def test_pictures_of_four_channels_and_16_bits(tmp_path):
    blocks = python_blocks('configs/fcmae/README.md')
    (block,) = [each for each in blocks if 'in_channels' in each]
    path = tmp_path / 'my_pretraining.py'
    base = 'mmcnv2::fcmae/fcmae_convnextv2-atto_800e_imagenet.py'
    path.write_text(f"_base_ = '{base}'\n{block}")
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    pictures = np.random.default_rng(0).integers(0, 4096, (1, 4, 64, 64), np.uint16)
    batch = model.data_preprocessor({'inputs': torch.from_numpy(pictures)})
    (found,) = model(batch['inputs'], mode='predict')
    np.testing.assert_allclose(found.picture, pictures[0], atol=0.01)
    assert found.data_range == 4095


def test_own_detector_starts_from_own_pretraining(tmp_path):
    blocks = python_blocks('docs/own_data.md')
    path = tmp_path / 'my_config.py'
    path.write_text(blocks[0])
    child = tmp_path / 'child.py'
    child.write_text(f"_base_ = './my_config.py'\n{blocks[3]}")
    start = Config.fromfile(child).model.backbone.init_cfg
    assert start.checkpoint == 'work_dirs/my_pretraining/epoch_800.pth'
    assert start.prefix == 'backbone.'


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
    swap = python_blocks('README.md')[0]
    assert 'mmcnv2.ConvNeXtV2' in swap
    base = "_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'\n"
    path = tmp_path / 'swapped.py'
    path.write_text(base + swap)
    cfg = Config.fromfile(path)
    cfg.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    assert type(model.backbone).__name__ == 'ConvNeXtV2'
    assert [conv.in_channels for conv in model.neck.lateral_convs] == [
        96,
        192,
        384,
        768,
    ]
