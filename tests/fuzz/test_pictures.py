"""Pictures of all kinds, whole and broken, through the pipelines of our configs."""

import io
from typing import Any

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from PIL import Image, ImageOps

from mmcnv2.datasets import UnlabelledImages

from ..tools.conftest import ROOT
from .conftest import FACTOR, clear_error, damaged

ORIENTATION = 0x0112
LOSSLESS = ('BMP', 'GIF', 'PNG', 'PPM', 'TIFF')
MODES = {
    'BMP': ('1', 'L', 'P', 'RGB'),
    'GIF': ('L', 'P'),
    'JPEG': ('CMYK', 'L', 'RGB'),
    'PNG': ('1', 'I;16', 'L', 'LA', 'P', 'RGB', 'RGBA'),
    'PPM': ('1', 'I;16', 'L', 'RGB'),
    'TIFF': ('1', 'CMYK', 'I;16', 'L', 'P', 'RGB'),
    'WEBP': ('RGB', 'RGBA'),
}
SUFFIXES = ('.jpg', '.png', '.bmp', '.webp', '.tif')
READ = [dict(type='LoadImageFromFile')]
needs_opencv_5 = pytest.mark.skipif(
    int(cv2.__version__.split('.')[0]) < 5,
    reason='OpenCV 4 turns JPEGs alone as EXIF says, and reads no GIF',
)


def draw(
    generator: np.random.Generator, size: tuple[int, int] | None = None
) -> Image.Image:
    """Draw smooth colours, which JPEG keeps, of a size up to 96 x 96."""
    width, height = size or tuple(int(n) for n in generator.integers(1, 97, 2))
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(picture: Image.Image, kind: str, mode: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if mode == 'I;16':
        pixels = np.array(picture.convert('L')).astype(np.uint16) * 256 + 77
        picture = Image.fromarray(pixels)
    elif mode == 'P':
        picture = picture.quantize(32)
    else:
        picture = picture.convert(mode)
    if 'A' in mode:
        picture.putalpha(picture.convert('L'))
    if kind == 'JPEG':
        options |= dict(quality=95, subsampling=0)
    if kind == 'WEBP':
        # Colours below full transparency too.
        options |= dict(lossless=True, exact=True)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def as_pillow_reads(data: bytes) -> np.ndarray:
    """Return red, green and blue, turned as EXIF says; of 16 bits the upper eight."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if picture.mode.startswith('I'):
        grey = (np.array(picture) // 256).astype(np.uint8)
        return np.dstack([grey] * 3)
    return np.array(picture.convert('RGB'))


@needs_opencv_5
def test_whole_pictures_are_as_pillow_reads_them(tmp_path, generator):
    kinds = [(kind, mode) for kind, modes in MODES.items() for mode in modes]
    names = []
    for i in range(600 * FACTOR):
        kind, mode = kinds[i % len(kinds)]
        picture = draw(generator)
        options: dict[str, Any] = {}
        if kind in ('GIF', 'TIFF', 'WEBP') and mode in ('L', 'RGB') and i % 2:
            # Animated, or of several pages: the first counts.
            other = picture.rotate(180).convert(mode)
            options = dict(save_all=True, append_images=[other])
        elif kind in ('JPEG', 'PNG', 'TIFF', 'WEBP') and mode != 'I;16':
            exif = Image.Exif()
            exif[ORIENTATION] = int(generator.integers(1, 9))
            options = dict(exif=exif)
        # The suffix says nothing of what is in it, as with many a download.
        name = f'{i}{generator.choice(SUFFIXES)}'
        (tmp_path / name).write_bytes(encode(picture, kind, mode, **options))
        names.append((name, kind, mode))
    (tmp_path / 'list').write_text('\n'.join(name for name, _, _ in names))
    dataset = UnlabelledImages('list', str(tmp_path), pipeline=READ, test_mode=True)
    for i, (name, kind, mode) in enumerate(names):
        expected = as_pillow_reads((tmp_path / name).read_bytes())
        actual = dataset[i]['img'][..., ::-1]
        assert actual.shape == expected.shape, (name, kind, mode)
        # Decoders round differently, and CMYK once more.
        most = 0 if kind in LOSSLESS and mode != 'CMYK' else 3
        difference = np.abs(actual.astype(int) - expected).max()
        assert difference <= most, (name, kind, mode, difference)


def test_broken_pictures_are_named_or_read(tmp_path, generator):
    kinds = [(kind, mode) for kind, modes in MODES.items() for mode in modes]
    path = tmp_path / 'broken.jpg'
    path.touch()
    dataset = UnlabelledImages(
        data_root=str(tmp_path), pipeline=READ, test_mode=True, serialize_data=False
    )
    pictures = [encode(draw(generator, (48, 32)), *kind) for kind in kinds]
    errors = 0
    for i in range(2000 * FACTOR):
        data = damaged(pictures[i % len(pictures)], generator)
        path.write_bytes(data)
        with clear_error(path) as raised:
            picture = dataset[0]['img']
            assert picture.dtype == np.uint8
            assert picture.ndim == 3
            assert picture.shape[2] == 3
        errors += len(raised)
    assert 0.3 < errors / (2000 * FACTOR) < 0.9
    for data in (b'', bytes(1000), b'<html></html>', b'\xff\xd8\xff'):
        path.write_bytes(data)
        with pytest.raises(
            RuntimeError, match=r'Cannot read the picture .*broken\.jpg'
        ):
            dataset[0]


SIZES = [(1, 1), (20000, 3), (3, 20000), (1, 700), (31, 33), (32, 1)]


@pytest.mark.parametrize('loader', ['train', 'val'])
def test_sizes_through_pretraining(tmp_path, generator, loader):
    config = ROOT / 'configs' / 'fcmae' / 'fcmae_convnextv2-tiny_800e_imagenet.py'
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    pipeline = Compose(cfg[f'{loader}_dataloader'].dataset.pipeline)
    for size in SIZES:
        path = tmp_path / 'picture.png'
        picture = draw(generator, size)
        path.write_bytes(encode(picture, 'PNG', 'RGB'))
        colours = np.array(picture)[..., ::-1].reshape(-1, 3).astype(int)
        for _ in range(20 * FACTOR):
            inputs = pipeline(dict(img_path=str(path), sample_idx=0))['inputs']
            assert inputs.shape == (3, 224, 224)
            # Bicubic interpolation reaches beyond what it interpolates.
            values = inputs.flatten(1).numpy().astype(int)
            assert (values.min(1) >= colours.min(0) - 30).all()
            assert (values.max(1) <= colours.max(0) + 30).all()
