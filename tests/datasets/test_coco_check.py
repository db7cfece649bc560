"""What of COCO files is refused, what is not, and that each error says where."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmcnv2.datasets import check_coco

RLE = {'size': [64, 96], 'counts': [6000, 144]}


@pytest.fixture
def content() -> dict[str, Any]:
    image = {'id': 1, 'file_name': 'a.png', 'height': 64, 'width': 96}
    box = {'bbox': [0, 0, 8, 8], 'area': 64, 'segmentation': [[0, 0, 8, 0, 8, 8]]}
    annotations = [
        {'id': i, 'image_id': 1, 'category_id': i % 2, 'iscrowd': 0, **box}
        for i in range(9)
    ]
    categories = [{'id': 0, 'name': 'cat'}, {'id': 1, 'name': 'dog'}]
    return dict(images=[image], annotations=annotations, categories=categories)


def check(content: Any, folder: Path, **options: Any) -> None:
    (folder / 'labels.json').write_text(json.dumps(content))
    check_coco(folder / 'labels.json', **options)


@pytest.mark.parametrize(
    'change',
    [
        {},
        {'segmentation': RLE},
        {'segmentation': {'size': [64, 96], 'counts': 'PPYo0'}},
        # MMDetection leaves these out by itself.
        {'bbox': [500, 500, 10, 10]},
        {'bbox': [10, 10, 0, 0]},
        {'segmentation': [[1, 1, 2, 2]]},
    ],
)
def test_nothing_wrong(content, tmp_path, change):
    content['annotations'][0] |= change
    check(content, tmp_path, classes=('cat', 'dog'))
    check(content, tmp_path, classes=('dog',))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'bbox': [1, 2, 3]}, r'its bbox is \[1, 2, 3\]'),
        ({'bbox': [1, 2, float('nan'), 4]}, r'its bbox is \[1, 2, nan, 4\]'),
        ({'area': None}, 'its area is None'),
        ({'image_id': 2}, 'no image has its image_id, 2'),
        ({'category_id': '0'}, "no category has its category_id, '0'"),
        ({'segmentation': []}, 'missing or empty'),
        ({'segmentation': [['a'] * 6]}, 'no list of numbers'),
        ({'segmentation': dict(RLE, size=[96, 64])}, r'\[96, 64\], but .* \[64, 96\]'),
        ({'segmentation': dict(RLE, counts=[6000])}, '6000 pixels, and its image 6144'),
        ({'id': 3.5}, 'its id is missing, or neither'),
    ],
)
def test_wrong_annotation(content, tmp_path, change, message):
    content['annotations'][3] |= change
    where = r'labels\.json has 1 errors.*annotation 3(\.5)?: '
    with pytest.raises(ValueError, match=f'{where}.*{message}'):
        check(content, tmp_path)


@pytest.mark.parametrize('kind', ['images', 'annotations', 'categories'])
def test_ids_that_occur_twice(content, tmp_path, kind):
    content[kind].append(dict(content[kind][0], name='bird'))
    with pytest.raises(ValueError, match=r' \d: 2 have this id'):
        check(content, tmp_path)


def test_masks_that_nobody_needs(content, tmp_path):
    for annotation in content['annotations']:
        del annotation['segmentation']
    check(content, tmp_path, masks=False)
    with pytest.raises(ValueError, match=r'9 errors.*; annotation 4: .*, and 4 more'):
        check(content, tmp_path)


@pytest.mark.parametrize(
    ('classes', 'found'),
    [
        (('dog', 'cat'), "'cat', 'dog'"),
        (('cat', 'bird', 'dog'), "'cat', 'dog'"),
        (('car',), 'none'),
    ],
)
def test_classes_that_mmdetection_would_number_otherwise(
    content, tmp_path, classes, found
):
    with pytest.raises(ValueError, match=f'it has {found}, in this order'):
        check(content, tmp_path, classes=classes)


def test_testing_needs_no_annotations(content, tmp_path):
    del content['annotations']
    check(content, tmp_path, test_mode=True)
    with pytest.raises(ValueError, match='annotations is missing'):
        check(content, tmp_path)


@pytest.mark.parametrize('text', ['', '{"images": [', '[' * 10**5, '\udcff'])
def test_not_json(tmp_path, text):
    (tmp_path / 'labels.json').write_bytes(text.encode(errors='surrogateescape'))
    with pytest.raises(ValueError, match=r'labels\.json is not JSON'):
        check_coco(tmp_path / 'labels.json')
