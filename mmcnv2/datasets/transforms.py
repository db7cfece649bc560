"""What happens to a picture on its way into pre-training, besides what MMCV offers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmcv.image import imresize
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmengine.structures import BaseDataElement

from ..arguments import check_arguments
from ..registry import TRANSFORMS

_ATTEMPTS = 10


@TRANSFORMS.register_module()
@check_arguments
class RandomResizedCrop(BaseTransform):
    """Cut out a rectangle of random area, shape and place, and resize it.

    The same as torchvision's transform of this name: up to ten attempts at a rectangle
    that fits into the picture, then the largest one in its middle whose shape is
    allowed. Random numbers come from NumPy's global generator.

    Changes ``img`` and ``img_shape``.

    Args:
        scale: Size of the result, (width, height) in pixels, or one side of a square.
        crop_ratio_range: Least and greatest share of the picture's area.
        aspect_ratio_range: Least and greatest width / height of what is cut out, as it
            is before resizing.
        interpolation: ``nearest``, ``bilinear``, ``bicubic`` or another method of
            :func:`mmcv.imresize`.
        backend: What resizes: ``pillow``, which smooths when it shrinks, takes pictures
            of 8 bits; ``cv2`` others too.

    Raises:
        ValueError: If ``scale`` is no size.
    """

    def __init__(
        self,
        scale: int | Sequence[int],
        crop_ratio_range: tuple[float, float] = (0.2, 1.0),
        aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = 'bicubic',
        backend: str = 'pillow',
    ) -> None:
        sides = (scale, scale) if isinstance(scale, int) else tuple(scale)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f'scale is {scale}; give one or two positive numbers')
        self.scale = sides
        self.crop_ratio_range = crop_ratio_range
        self.aspect_ratio_range = aspect_ratio_range
        self.interpolation = interpolation
        self.backend = backend

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Crop and resize ``img``, (H, W) or (H, W, C).

        Raises:
            ValueError: If Pillow is to resize what it cannot.
        """
        picture = results['img']
        if self.backend == 'pillow' and picture.dtype != np.uint8:
            raise ValueError(
                f'Pillow cannot resize a picture of type {picture.dtype}: set '
                "backend='cv2' in RandomResizedCrop."
            )
        top, left, height, width = self._rectangle(*picture.shape[:2])
        cut = picture[top : top + height, left : left + width]
        results['img'] = self._resize(cut)
        results['img_shape'] = results['img'].shape[:2]
        return results

    def _resize(self, picture: np.ndarray) -> np.ndarray:
        if self.backend == 'pillow' and picture.ndim == 3 and picture.shape[2] != 3:
            # Pillow takes a second or fourth channel for opacity, and weighs by it.
            channels = np.moveaxis(picture, 2, 0)
            return np.stack([self._resize(channel) for channel in channels], 2)
        return imresize(
            picture,
            self.scale,
            interpolation=self.interpolation,
            backend=self.backend,
        )

    @cache_randomness
    def _rectangle(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw (top, left, height, width) of what to cut out of a picture."""
        log_aspects = np.log(self.aspect_ratio_range)
        for _ in range(_ATTEMPTS):
            area = height * width * np.random.uniform(*self.crop_ratio_range)
            aspect = np.exp(np.random.uniform(*log_aspects))
            w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top = np.random.randint(0, height - h + 1)
                left = np.random.randint(0, width - w + 1)
                return top, left, h, w
        return self._middle(height, width)

    def _middle(self, height: int, width: int) -> tuple[int, int, int, int]:
        narrowest, widest = self.aspect_ratio_range
        # At least one pixel, also where no rectangle of the picture has such a shape.
        h = min(height, max(1, round(width / narrowest)))
        w = min(width, max(1, round(height * widest)))
        return (height - h) // 2, (width - w) // 2, h, w

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(scale={self.scale}, '
            f'crop_ratio_range={self.crop_ratio_range}, '
            f'aspect_ratio_range={self.aspect_ratio_range}, '
            f'interpolation={self.interpolation!r}, backend={self.backend!r})'
        )


@TRANSFORMS.register_module()
@check_arguments
class PackPretrainInputs(BaseTransform):
    """Pack a picture and what is known about it as FCMAE takes them.

    Gives ``inputs``, the picture as a tensor (C, H, W) of the type it had, and
    ``data_samples``, a :class:`~mmengine.structures.BaseDataElement`.

    Args:
        meta_keys: What to put into the meta information of the data sample, as far as
            it is there. FCMAE draws the masks for testing from ``sample_idx``.
    """

    def __init__(
        self,
        meta_keys: Sequence[str] = (
            'img_path',
            'ori_shape',
            'img_shape',
            'sample_idx',
            'broken_paths',
        ),
    ) -> None:
        self.meta_keys = meta_keys

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Pack ``img``, (H, W) or (H, W, C), and the meta information."""
        picture = np.atleast_3d(results['img']).transpose(2, 0, 1)
        known = {key: results[key] for key in self.meta_keys if key in results}
        return {
            'inputs': torch.from_numpy(np.ascontiguousarray(picture)),
            'data_samples': BaseDataElement(metainfo=known),
        }

    def __repr__(self) -> str:
        return f'{type(self).__name__}(meta_keys={tuple(self.meta_keys)})'
