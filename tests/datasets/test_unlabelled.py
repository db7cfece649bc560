"""Where pictures are looked for, and what happens to those that cannot be read."""

import io
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from PIL import Image
from torch.utils.data import DataLoader

from mmcnv2.datasets import UnlabelledImages
from mmcnv2.registry import DATASETS

READ = [dict(type='LoadImageFromFile')]
PACK = [*READ, dict(type='mmcnv2.PackPretrainInputs')]


def write(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ok, data = cv2.imencode('.png', np.full((4, 6, 3), value, np.uint8))
    assert ok
    path.write_bytes(data)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    names = ['b.PNG', 'a.jpg', 'c/2.Jpeg', 'c/1.webp', 'c/d/e.tif', 'c/f.bmp']
    for i, name in enumerate(names):
        write(tmp_path / name, i)
    for name in ('notes.txt', 'c/labels.json', '.hidden.png', 'c/png', '.thumbs/1.png'):
        write(tmp_path / name)
    return tmp_path


def found(dataset: UnlabelledImages, root: Path) -> list[str]:
    paths = [Path(dataset.get_data_info(i)['img_path']) for i in range(len(dataset))]
    return [str(path.relative_to(root)) for path in paths]


def test_folder_tree(tree):
    names = ['a.jpg', 'b.PNG', 'c/1.webp', 'c/2.Jpeg', 'c/d/e.tif', 'c/f.bmp']
    assert found(UnlabelledImages(data_root=str(tree)), tree) == names


def test_prefix_and_indices(tree):
    dataset = DATASETS.build(
        dict(
            type='UnlabelledImages',
            data_root=str(tree),
            data_prefix=dict(img_path='c'),
            indices=2,
        )
    )
    assert found(dataset, tree) == ['c/1.webp', 'c/2.Jpeg']


def test_linked_folder(tree, tmp_path_factory):
    root = tmp_path_factory.mktemp('links')
    (root / 'link').symlink_to(tree / 'c')
    assert len(UnlabelledImages(data_root=str(root))) == 4


def test_links_that_lead_back(tree):
    """Two would be followed in every order, and that to the end of time."""
    for name in ('again', 'c/up', 'c/d/top'):
        (tree / name).symlink_to(tree)
    (tree / 'z').symlink_to(tree / 'c')
    assert len(UnlabelledImages(data_root=str(tree))) == 6
    assert len(UnlabelledImages(data_root=str(tree / '.thumbs'))) == 1


def test_list(tree):
    (tree / 'list.txt').write_text('d/e.tif\n\n  1.webp \n')
    dataset = UnlabelledImages('list.txt', str(tree), dict(img_path='c'), pipeline=READ)
    assert found(dataset, tree) == ['c/d/e.tif', 'c/1.webp']
    assert dataset[0]['img'].shape == (4, 6, 3)
    assert (dataset[0]['img'] == 4).all()


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(data_root='{}/none'), FileNotFoundError, r'no folder .*none'),
        (dict(data_root='{}/empty'), FileNotFoundError, r'in .*empty.*\.jpg.*upper'),
        (dict(data_root='{}', ann_file='no.txt'), FileNotFoundError, r'list .*no\.txt'),
        (
            dict(data_root='{}', ann_file='0.txt'),
            FileNotFoundError,
            r'path in .*0\.txt',
        ),
        (
            dict(data_root='{}', ann_file='a.json'),
            ValueError,
            r'a\.json.*leave ann_file',
        ),
        ({}, ValueError, 'Set data_root'),
        (
            dict(data_root='{}', data_prefix=dict(img='a')),
            ValueError,
            r"{'img': 'a'}; it holds nothing but 'img_path'",
        ),
    ],
)
def test_nothing_to_take_is_an_error_at_once(tmp_path, arguments, error, message):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'notes.txt').touch()
    (tmp_path / '0.txt').write_text('\n\n')
    (tmp_path / 'a.json').write_text('{}')
    arguments = {
        key: value.format(tmp_path) if isinstance(value, str) else value
        for key, value in arguments.items()
    }
    with pytest.raises(error, match=message):
        UnlabelledImages(**arguments)


def jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return cv2.imencode('.jpg', noise)[1].tobytes()


def progressive_jpeg() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, 'JPEG', progressive=True)
    return buffer.getvalue()


BROKEN = {
    'empty': b'',
    'foreign': b'<html>not found</html>',
    'header only': jpeg()[:100],
    'half': jpeg()[: len(jpeg()) // 2],
    'progressive': progressive_jpeg()[: len(progressive_jpeg()) // 2],
    'missing': None,
}


@pytest.fixture(params=BROKEN)
def with_broken(request, tmp_path) -> Path:
    """Hold two good pictures, and ``1.jpg`` that is broken."""
    write(tmp_path / '0.png', 10)
    write(tmp_path / '2.png', 20)
    if BROKEN[request.param] is not None:
        (tmp_path / '1.jpg').write_bytes(BROKEN[request.param])
    (tmp_path / 'list').write_text('0.png\n1.jpg\n2.png\n')
    return tmp_path


# Pillow sees what OpenCV before version 5 does not.
STRICT = [dict(type='LoadImageFromFile', imdecode_backend='pillow'), PACK[1]]


# Serialising collects garbage, which takes long after many imports.
QUICK = dict(serialize_data=False)


@pytest.mark.parametrize('pipeline', [STRICT, PACK], ids=['pillow', 'cv2'])
def test_broken_file_is_replaced_and_named(with_broken, pipeline, request):
    truncated = request.node.callspec.params['with_broken'] in ('half', 'progressive')
    if truncated and pipeline is PACK and int(cv2.__version__.split('.')[0]) < 5:
        pytest.skip('OpenCV before version 5 decodes truncated JPEG files in part')
    dataset = UnlabelledImages('list', str(with_broken), pipeline=pipeline, **QUICK)
    np.random.seed(0)
    sample = dataset[1]
    assert sample['data_samples'].broken_paths == (str(with_broken / '1.jpg'),)
    assert int(sample['inputs'][0, 0, 0]) in (10, 20)
    # The next one stands for nothing.
    assert dataset[0]['data_samples'].broken_paths == ()


def test_broken_file_is_an_error_in_testing(with_broken):
    dataset = UnlabelledImages(
        'list', str(with_broken), pipeline=STRICT, test_mode=True, **QUICK
    )
    assert int(dataset[2]['inputs'].max()) == 20
    with pytest.raises(RuntimeError, match=r'Cannot read the picture .*/1\.jpg'):
        dataset[1]


class Lines(logging.Handler):
    """Append to a file, which loader workers can do too."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        with self.path.open('a') as file:
            file.write(f'{record.getMessage()}\n')


def test_broken_file_is_logged_once_by_all_workers(tmp_path):
    for i in range(4):
        write(tmp_path / f'{i}.png')
    for name in ('a.jpg', 'b.jpg'):
        (tmp_path / name).touch()
    dataset = UnlabelledImages(data_root=str(tmp_path), pipeline=PACK)
    handler = Lines(tmp_path / 'log.txt')
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    met = set()
    try:
        # Shuffled, so that either worker meets either file sooner or later.
        loader = DataLoader(dataset, 2, True, num_workers=2, collate_fn=pseudo_collate)
        for batch in [batch for _ in range(4) for batch in loader]:
            met.update(*(sample.broken_paths for sample in batch['data_samples']))
    finally:
        logger.removeHandler(handler)
    broken = [str(tmp_path / name) for name in ('a.jpg', 'b.jpg')]
    lines = (tmp_path / 'log.txt').read_text().splitlines()
    assert met == set(broken)
    for path in broken:
        assert sum(path in line for line in lines) == 1


def test_only_broken_files_are_an_error(tmp_path):
    (tmp_path / '0.jpg').touch()
    dataset = UnlabelledImages(data_root=str(tmp_path), pipeline=PACK, max_refetch=7)
    with pytest.raises(RuntimeError, match=r'any of 8 pictures .*0\.jpg'):
        dataset[0]


def test_reader_that_gives_nothing_counts_as_broken(tmp_path):
    write(tmp_path / '0.png')
    (tmp_path / '1.png').touch()
    reader = dict(type='LoadImageFromFile', ignore_empty=True)
    dataset = UnlabelledImages(data_root=str(tmp_path), pipeline=[reader, PACK[1]])
    broken = dataset[1]['data_samples'].broken_paths
    assert broken == (str(tmp_path / '1.png'),)


def test_errors_of_other_transforms_are_errors(tmp_path):
    write(tmp_path / '0.png')
    crop = dict(type='mmcnv2.RandomResizedCrop', scale=32, interpolation='none')
    dataset = UnlabelledImages(data_root=str(tmp_path), pipeline=[*READ, crop])
    with pytest.raises(KeyError, match='none'):
        dataset[0]


def test_sample_that_a_transform_drops_keeps_the_broken_paths(tmp_path):
    write(tmp_path / '0.png')
    (tmp_path / '1.png').touch()
    answers = iter([False, True])

    def drop_once(results: dict) -> dict | None:
        return results if next(answers) else None

    dataset = UnlabelledImages(
        data_root=str(tmp_path), pipeline=[*READ, drop_once, PACK[1]]
    )
    sample = dataset[1]
    assert sample['data_samples'].broken_paths == (str(tmp_path / '1.png'),)
