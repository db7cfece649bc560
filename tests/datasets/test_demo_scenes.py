"""The demo scenes: reproducible, true to their annotations, safely made."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mmcnv2.datasets.demo_scenes import (
    CLASSES,
    PALETTE,
    SEMANTIC_CLASSES,
    SEMANTIC_PALETTE,
    make_demo_scenes,
)
from mmcnv2.registry import DATASETS

COUNTS = {'train': 12, 'val': 4, 'unlabelled': 3}
MAKE = 'import sys, json; from mmcnv2.datasets.demo_scenes import make_demo_scenes; '


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path:
    return make_demo_scenes(tmp_path_factory.mktemp('scenes') / 'demo', counts=COUNTS)


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob('*') if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def start(root: Path, counts: dict[str, int], workers: int = 1) -> subprocess.Popen:
    call = f'make_demo_scenes({str(root)!r}, counts={counts}, workers={workers})'
    return subprocess.Popen([sys.executable, '-c', MAKE + call])


@pytest.mark.parametrize('workers', [1, 2])
def test_same_seed_gives_same_bytes(root, tmp_path, workers):
    again = make_demo_scenes(tmp_path / 'again', counts=COUNTS, workers=workers)
    assert contents(again) == contents(root)


def test_other_seed_gives_other_pictures(root, tmp_path):
    other = make_demo_scenes(tmp_path / 'other', seed=1, counts=COUNTS)
    name = 'images/train/00000.jpg'
    assert contents(other)[name] != contents(root)[name]


def test_layout_and_distinct_pictures(root):
    pictures = [data for name, data in contents(root).items() if name.endswith('.jpg')]
    assert len(set(pictures)) == len(pictures) == sum(COUNTS.values())
    for split, count in COUNTS.items():
        names = sorted(path.name for path in (root / 'images' / split).iterdir())
        assert names == [f'{index:05}.jpg' for index in range(count)]
    held = json.loads((root / 'scenes.json').read_text())
    assert (held['seed'], held['counts']) == (0, COUNTS)
    assert [path.name for path in root.parent.glob('.*')] in ([], ['.demo.lock'])


@pytest.mark.parametrize('split', ['train', 'val'])
def test_annotations_agree(root, split):
    coco = COCO(str(root / 'annotations' / f'{split}.json'))
    assert tuple(coco.cats[i]['name'] for i in sorted(coco.cats)) == CLASSES
    assert len(coco.imgs) == COUNTS[split]
    for image in coco.imgs.values():
        picture = cv2.imread(str(root / 'images' / split / image['file_name']))
        assert picture.shape == (image['height'], image['width'], 3)
        stem = Path(image['file_name']).stem
        path = root / 'semantic' / split / f'{stem}.png'
        semantic = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert semantic.dtype == np.uint8
        assert np.array_equal(semantic, union_of_masks(coco, image['id']))


def union_of_masks(coco: COCO, image_id: int) -> np.ndarray:
    """The class map from the instance masks, each checked against its annotation."""
    image = coco.imgs[image_id]
    union = np.zeros((image['height'], image['width']), np.uint8)
    annotations = coco.imgToAnns[image_id]
    assert annotations
    for annotation in annotations:
        mask = coco.annToMask(annotation).astype(bool)
        assert not union[mask].any(), 'visible parts must not overlap'
        assert mask.sum() == annotation['area'] >= 90
        x, y, width, height = annotation['bbox']
        assert (x, y, width, height) == cv2.boundingRect(mask.astype(np.uint8))
        assert annotation['iscrowd'] == 0
        union[mask] = annotation['category_id']
    return union


def test_objects_are_where_the_masks_are(root):
    """The outlines of the masks lie on stronger edges than the average pixel."""
    on_outline, everywhere = [], []
    for index in range(COUNTS['train']):
        grey = cv2.imread(str(root / f'images/train/{index:05}.jpg'), 0)
        semantic = cv2.imread(str(root / f'semantic/train/{index:05}.png'), 0)
        edges = np.hypot(cv2.Sobel(grey, 5, 1, 0), cv2.Sobel(grey, 5, 0, 1))
        outline = cv2.morphologyEx(semantic, cv2.MORPH_GRADIENT, np.ones((2, 2)))
        on_outline.append(edges[outline > 0].mean())
        everywhere.append(edges.mean())
    assert np.mean(on_outline) > 1.5 * np.mean(everywhere)


def test_all_classes_occur(root):
    annotations = json.loads((root / 'annotations/train.json').read_text())
    present = {instance['category_id'] for instance in annotations['annotations']}
    assert present == set(range(1, len(CLASSES) + 1))


def test_several_processes_at_once(root, tmp_path):
    together = tmp_path / 'demo'
    processes = [start(together, COUNTS) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert contents(together) == contents(root)


def test_interrupted_run_leaves_nothing(root, tmp_path):
    folder = tmp_path / 'demo'
    process = start(folder, {**COUNTS, 'train': 5000}, workers=2)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob('.demo.unfinished-*/images/train/*.jpg')):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not folder.exists()

    make_demo_scenes(folder, counts=COUNTS)
    assert contents(folder) == contents(root)
    # Workers of the killed process end at their next picture.
    assert not list(tmp_path.glob('.demo.unfinished-*'))


def test_other_contents_are_refused(root, tmp_path):
    with pytest.raises(RuntimeError, match=r"demo .*'seed': 0.*'seed': 7.*Delete"):
        make_demo_scenes(root, seed=7, counts=COUNTS)
    with pytest.raises(RuntimeError, match='no demo scenes'):
        make_demo_scenes(tmp_path, counts=COUNTS)


def test_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match='unlabeled'):
        make_demo_scenes(tmp_path / 'demo', counts={'unlabeled': 1})
    assert not list(tmp_path.iterdir())


def test_factory_builds_coco_dataset(root):
    pytest.importorskip('mmdet.datasets')
    config = {
        'type': 'mmcnv2.DemoScenes',
        'dataset_type': 'mmdet.CocoDataset',
        'data_root': str(root),
        'counts': COUNTS,
        'ann_file': 'annotations/train.json',
        'data_prefix': {'img': 'images/train/'},
        'pipeline': [
            {'type': 'LoadImageFromFile'},
            {'type': 'mmdet.LoadAnnotations', 'with_bbox': True, 'with_mask': True},
        ],
    }
    dataset = DATASETS.build(config)
    assert type(dataset).__name__ == 'CocoDataset'
    assert tuple(dataset.metainfo['classes']) == CLASSES
    assert dataset.metainfo['palette'] == PALETTE
    assert len(dataset) == COUNTS['train']
    sample = dataset[0]
    assert sample['img'].shape == (256, 256, 3)
    areas = sample['gt_masks'].areas
    assert areas.tolist() == [instance['area'] for instance in instances_of(root, 0)]
    assert len(sample['gt_bboxes']) == len(areas)


def test_factory_tells_the_classes_without_scenes(tmp_path):
    pytest.importorskip('mmdet.datasets')
    config = {
        'type': 'mmcnv2.DemoScenes',
        'dataset_type': 'mmdet.CocoDataset',
        'data_root': str(tmp_path / 'demo'),
        'ann_file': 'annotations/train.json',
        'lazy_init': True,
    }
    assert DATASETS.build(config).metainfo['palette'] == PALETTE
    assert not list(tmp_path.iterdir())


def instances_of(root: Path, image_id: int) -> list[dict]:
    annotations = json.loads((root / 'annotations/train.json').read_text())
    return [a for a in annotations['annotations'] if a['image_id'] == image_id]


def test_factory_builds_segmentation_dataset(root):
    pytest.importorskip('mmseg.datasets')
    config = {
        'type': 'mmcnv2.DemoScenes',
        'dataset_type': 'mmseg.BaseSegDataset',
        'data_root': str(root),
        'counts': COUNTS,
        'data_prefix': {'img_path': 'images/val', 'seg_map_path': 'semantic/val'},
        'pipeline': [
            {'type': 'LoadImageFromFile'},
            {'type': 'mmseg.LoadAnnotations'},
        ],
    }
    dataset = DATASETS.build(config)
    assert type(dataset).__name__ == 'BaseSegDataset'
    assert tuple(dataset.metainfo['classes']) == SEMANTIC_CLASSES
    assert dataset.metainfo['palette'] == SEMANTIC_PALETTE
    assert len(dataset) == COUNTS['val']
    sample = dataset[0]
    expected = cv2.imread(str(root / 'semantic/val/00000.png'), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(sample['gt_seg_map'], expected)


def test_callers_metainfo_wins(root):
    pytest.importorskip('mmdet.datasets')
    dataset = DATASETS.build(
        {
            'type': 'mmcnv2.DemoScenes',
            'dataset_type': 'mmdet.CocoDataset',
            'data_root': str(root),
            'counts': COUNTS,
            'ann_file': 'annotations/val.json',
            'data_prefix': {'img': 'images/val/'},
            'metainfo': {'classes': ('mug',)},
        }
    )
    assert dataset.metainfo['classes'] == ('mug',)
