"""RandomResizedCrop against a plain restatement of torchvision's rule; packing."""

import math

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmcv.transforms.utils import cache_random_params
from PIL import Image

from mmcnv2.datasets import PackPretrainInputs, RandomResizedCrop
from mmcnv2.registry import TRANSFORMS

AREAS, ASPECTS = (0.2, 1.0), (3 / 4, 4 / 3)


def coordinates(height: int, width: int) -> np.ndarray:
    """A picture whose pixels say where they are."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], 2).astype(np.uint8)


def restated(height, width, areas, aspects):
    """torchvision's RandomResizedCrop.get_params, with NumPy's random numbers."""
    for _ in range(10):
        target_area = height * width * np.random.uniform(areas[0], areas[1])
        log_ratio = np.random.uniform(math.log(aspects[0]), math.log(aspects[1]))
        aspect_ratio = math.exp(log_ratio)
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            i = np.random.randint(0, height - h + 1)
            j = np.random.randint(0, width - w + 1)
            return i, j, h, w
    in_ratio = float(width) / float(height)
    if in_ratio < min(aspects):
        w = width
        h = round(w / min(aspects))
    elif in_ratio > max(aspects):
        h = height
        w = round(h * max(aspects))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def with_pillow(picture, box, size):
    i, j, h, w = box
    cut = Image.fromarray(picture[i : i + h, j : j + w])
    return np.asarray(cut.resize(size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize('shape', [(60, 80), (97, 41), (64, 64), (20, 200), (200, 7)])
@pytest.mark.parametrize(
    ('areas', 'aspects'), [(AREAS, ASPECTS), ((0.5, 0.6), (1.0, 2.0))]
)
def test_is_torchvisions(shape, areas, aspects):
    picture = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    transform = RandomResizedCrop((32, 24), areas, aspects)
    for seed in range(20):
        np.random.seed(seed)
        result = transform({'img': picture})
        np.random.seed(seed)
        box = restated(*shape, areas, aspects)
        assert np.array_equal(result['img'], with_pillow(picture, box, (32, 24)))
        assert result['img_shape'] == (24, 32)


def rectangles(transform, height, width, count):
    """What is cut out, as (top, left, height, width), read from the pixels."""
    found = []
    for _ in range(count):
        # Without resizing, nearest pixels of the corners name their places.
        cut = transform({'img': coordinates(height, width)})['img']
        (top, left), (bottom, right) = cut[0, 0, :2], cut[-1, -1, :2]
        found.append((top, left, bottom - top + 1.0, right - left + 1.0))
    return np.array(found, dtype=float)


def test_distribution():
    np.random.seed(0)
    # A result larger than the picture, so that every pixel cut out is seen.
    transform = RandomResizedCrop(256, interpolation='nearest')
    top, left, height, width = rectangles(transform, 128, 128, 3000).T
    area, aspect = height * width / 128**2, width / height
    assert area.min() > 0.19
    assert area.max() <= 1
    assert 0.73 < aspect.min() < 0.77
    assert 1.3 < aspect.max() < 1.36
    # Uniform but for large ones that do not fit; shares from a million draws by the
    # rule, and more than three standard deviations for chance.
    assert np.mean(area < 0.3) == pytest.approx(0.149, abs=0.022)
    assert np.mean(area < 0.6) == pytest.approx(0.593, abs=0.03)
    assert np.mean(np.log(aspect)) == pytest.approx(0, abs=0.02)
    free = (128 - height) > 20
    assert np.mean(top[free] / (128 - height[free])) == pytest.approx(0.5, abs=0.02)
    assert np.mean(left[free] / (128 - height[free])) == pytest.approx(0.5, abs=0.04)


def test_seed_decides():
    picture = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    transform = RandomResizedCrop(32)

    def run(seed):
        np.random.seed(seed)
        return transform({'img': picture})['img']

    assert np.array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))


def test_shared_random_parameters():
    """The same rectangle of several pictures, as mmcv's TransformBroadcaster asks."""
    picture = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    transform = RandomResizedCrop(32)
    with cache_random_params(transform):
        first, second = (transform({'img': picture})['img'] for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, transform({'img': picture})['img'])


@pytest.mark.parametrize('shape', [(1, 1), (1, 50), (50, 1), (2, 1000), (1000, 3)])
def test_degenerate_pictures(shape):
    """All that is cut out lies within the picture: its one value stays."""
    picture = np.full((*shape, 3), 77, np.uint8)
    for seed in range(20):
        np.random.seed(seed)
        result = RandomResizedCrop((32, 64))({'img': picture})['img']
        assert result.shape == (64, 32, 3)
        assert (result == 77).all()


def test_middle_of_a_strip():
    """No rectangle of a long strip has the wanted area: the widest in the middle."""
    picture = coordinates(30, 250)
    cut = RandomResizedCrop((40, 30), interpolation='nearest')({'img': picture})['img']
    assert np.array_equal(cut, picture[:, 105:145])


def test_shape_that_no_rectangle_has():
    picture = np.full((1, 1, 3), 5, np.uint8)
    result = RandomResizedCrop(32, aspect_ratio_range=(3, 4))({'img': picture})
    assert (result['img'] == 5).all()


@pytest.mark.parametrize('shape', [(50, 60), *((50, 60, n) for n in (1, 2, 4, 7))])
def test_channels_do_not_mix(shape):
    """Pillow would weigh two channels by the second, and four by the last."""
    picture = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    np.random.seed(0)
    found = RandomResizedCrop((32, 24))({'img': picture})['img']
    assert found.shape == (24, 32, *shape[2:])
    np.random.seed(0)
    box = restated(50, 60, AREAS, ASPECTS)
    for i, channel in enumerate(np.atleast_3d(picture).transpose(2, 0, 1)):
        expected = with_pillow(np.ascontiguousarray(channel), box, (32, 24))
        assert np.array_equal(np.atleast_3d(found)[..., i], expected)


@pytest.mark.parametrize('dtype', [np.uint16, np.float32])
@pytest.mark.parametrize('shape', [(9, 8), (9, 8, 4)])
def test_what_pillow_cannot_do_and_opencv_can(shape, dtype):
    picture = np.full(shape, 7, dtype)
    with pytest.raises(ValueError, match=r'backend=.cv2'):
        RandomResizedCrop(32)({'img': picture})
    result = RandomResizedCrop(32, backend='cv2')({'img': picture})['img']
    assert result.dtype == picture.dtype
    assert result.shape[:2] == (32, 32)
    assert (result == 7).all()


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize('shape', [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 5)])
def test_pack(dtype, shape):
    picture = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    packed = PackPretrainInputs()(
        {'img': picture[:, ::-1], 'sample_idx': 3, 'broken_paths': ('a',), 'other': 1}
    )
    channels = 1 if len(shape) == 2 else shape[2]
    expected = picture.reshape(4, 6, channels)[:, ::-1]
    assert packed['inputs'].is_contiguous()
    assert packed['inputs'].numpy().dtype == dtype
    assert np.array_equal(packed['inputs'].numpy(), np.moveaxis(expected, 2, 0))
    known = packed['data_samples'].metainfo
    assert known == {'sample_idx': 3, 'broken_paths': ('a',)}


def test_pack_chosen_keys():
    packed = PackPretrainInputs(meta_keys=['place'])(
        {'img': np.zeros((2, 2), np.uint8), 'place': 'here', 'img_path': 'there'}
    )
    assert packed['data_samples'].metainfo == {'place': 'here'}


def test_pipeline_from_a_file(tmp_path):
    """With MMCV's transforms, built by their names, from a file to a tensor."""
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / '0.png'), picture)
    names = [
        dict(type='LoadImageFromFile'),
        dict(type='RandomResizedCrop', scale=32),
        dict(type='RandomFlip', prob=1.0),
        dict(type='PackPretrainInputs'),
    ]
    transforms = [TRANSFORMS.build(each) for each in names]
    np.random.seed(4)
    packed = Compose(transforms)({'img_path': str(tmp_path / '0.png')})
    np.random.seed(4)
    box = restated(40, 50, AREAS, ASPECTS)
    expected = with_pillow(picture, box, (32, 32))[:, ::-1].transpose(2, 0, 1)
    assert torch.equal(packed['inputs'], torch.from_numpy(expected.copy()))
    known = packed['data_samples']
    assert known.ori_shape == (40, 50)
    assert known.img_shape == (32, 32)


@pytest.mark.parametrize('transform', [RandomResizedCrop(32), PackPretrainInputs()])
def test_repr_shows_the_arguments(transform):
    names = {'RandomResizedCrop': RandomResizedCrop}
    names['PackPretrainInputs'] = PackPretrainInputs
    assert repr(eval(repr(transform), names)) == repr(transform)
