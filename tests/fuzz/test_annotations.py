"""COCO files with errors: refused by name, or trained on as they are."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from mmcnv2.datasets import check_coco

from ..tools.conftest import ROOT, draw
from .conftest import FACTOR, clear_error

LSJ = 'mask_rcnn/mask-rcnn_convnextv2-tiny_fpn_lsj-3x_coco.py'
DEMO = 'demo/mask-rcnn_convnextv2-atto_fpn_demo.py'
JUNK = [
    *(None, True, -1, 0, 3, 10**12, 2.5, float('nan'), float('inf'), -1e30),
    *('', 'text', '1', [], [[]], [1, 2], [[1, 1, 2, 2]], [[None] * 6], {}, {'a': 1}),
    *([-5, -5, 3, 3], [500, 500, 10, 10], [10, 10, -5, -5], [80, 50, 100, 100]),
    *([[500.0, 500, 510, 500, 510, 510]], [[1, 1, 2, 2, 3, 3, 4]]),
    {'size': [64, 96], 'counts': [100, 44, 6000]},
    {'size': [64, 96], 'counts': [100, 44]},
    {'size': [96, 64], 'counts': [100, 44, 6000]},
    {'size': [64, 96], 'counts': [0, 10**9]},
]


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    draw(tmp_path, 3)
    content = json.loads((tmp_path / 'instances.json').read_text())
    content['categories'].append({'id': 2, 'name': 'bag'})
    return content


def spoil(content: dict[str, Any], generator: np.random.Generator) -> None:
    """Spoil one place."""
    kind = str(generator.choice(['images', 'annotations', 'annotations', 'categories']))
    items = content[kind]
    item = items[generator.integers(len(items))]
    key = str(generator.choice(sorted(item)))
    action = generator.integers(10)
    if action == 0:
        del content[kind]
    elif action == 1:
        content[kind] = JUNK[generator.integers(len(JUNK))]
    elif action == 2:
        items.append(copy.deepcopy(item))
    elif action == 3:
        items.remove(item)
    elif action == 4:
        del item[key]
    else:
        item[key] = JUNK[generator.integers(len(JUNK))]


def check_sample(sample: dict[str, Any]) -> None:
    instances = sample['data_samples'].gt_instances
    height, width = sample['data_samples'].img_shape
    boxes = instances.bboxes.tensor
    assert len(boxes) == len(instances.labels) == len(instances.masks)
    assert boxes.isfinite().all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    limits = torch.tensor([width, height, width, height])
    assert ((boxes >= 0) & (boxes <= limits)).all()
    assert ((instances.labels >= 0) & (instances.labels < 2)).all()
    assert instances.masks.masks.shape[1:] == (height, width)
    assert set(np.unique(instances.masks.masks)) <= {0, 1}


@pytest.mark.parametrize(('config', 'cases'), [(DEMO, 400), (LSJ, 20)], ids=str)
def test_spoilt_annotations(tmp_path, content, generator, config, cases):
    cfg = Config.fromfile(ROOT / 'configs' / config)
    init_default_scope('mmdet')
    path = tmp_path / 'spoilt.json'
    refused = 0
    for _ in range(cases * FACTOR):
        spoilt = copy.deepcopy(content)
        spoil(spoilt, generator)
        path.write_text(json.dumps(spoilt))
        with clear_error(path) as raised:
            check_coco(path, ('box', 'bag'))
        refused += len(raised)
        if raised:
            continue
        dataset = DATASETS.build(
            dict(
                type='CocoDataset',
                data_root=str(tmp_path),
                ann_file=path.name,
                data_prefix=dict(img='pictures/'),
                metainfo=dict(classes=('box', 'bag')),
                filter_cfg=dict(filter_empty_gt=True, min_size=32),
                pipeline=cfg.train_pipeline,
                serialize_data=False,
            )
        )
        for i in range(len(dataset)):
            # A file_name that leads nowhere is named when it comes to it.
            with clear_error(dataset.get_data_info(i)['img_path']):
                sample = dataset.prepare_data(i)
                if sample is not None:
                    check_sample(sample)
    assert 0.4 < refused / (cases * FACTOR) < 0.95
