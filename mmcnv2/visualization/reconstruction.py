"""Original, masked input and reconstruction side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..arguments import check_arguments
from ..registry import HOOKS

HEADER = ('original', 'masked input', 'reconstruction')
_HIDDEN = 128
_PAGE = (255, 255, 255)
_INK = (32, 32, 32)
_GAP = 4
# Narrower pictures are enlarged, so that the words fit above them.
_NARROWEST = 160
_FONT = Path(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')


def reconstruction_grid(samples: Sequence[BaseDataElement]) -> np.ndarray:
    """Lay out pictures in three columns: original, masked input, reconstruction.

    Of three and more channels the first three are shown as red, green and blue, so
    pre-training on three has to be with ``bgr_to_rgb``. Of one or two channels the
    first is shown in grey. Values are clipped. Pictures that are narrower than 160
    pixels are enlarged by a whole number, pixel by pixel.

    Args:
        samples: What FCMAE predicts, at least one: with ``mask`` (h, w), True for
            hidden patches, ``picture`` and ``reconstruction`` (C, H, W) in pixel units,
            and ``data_range``, the value that is shown as white; zero is black.

    Returns:
        RGB picture (height, width, 3) of type uint8, with a row for each sample below
        a header.
    """
    rows = [_row(sample) for sample in samples]
    widest = max(row.shape[2] for row in rows)
    zoom = -(-_NARROWEST // widest)
    rows = [row.repeat(zoom, 1).repeat(zoom, 2) for row in rows]
    width = widest * zoom
    page = _page(width, [row.shape[1] for row in rows])
    top = page.shape[0] - sum(row.shape[1] + _GAP for row in rows)
    for row in rows:
        height, narrower = row.shape[1:3]
        for column, cell in enumerate(row):
            left = _left(column, width) + (width - narrower) // 2
            page[top : top + height, left : left + narrower] = cell
        top += height + _GAP
    return page


def _left(column: int, width: int) -> int:
    return _GAP + column * (width + _GAP)


def _page(width: int, heights: list[int]) -> np.ndarray:
    """Make a page for columns of a width and rows of given heights, with its header."""
    size = int(np.clip(width // 11, 15, 36))
    header = 2 * size
    shape = (_left(len(HEADER), width), header + sum(heights) + _GAP * len(heights))
    page = Image.new('RGB', shape, _PAGE)
    draw = ImageDraw.Draw(page)
    font = ImageFont.truetype(str(_FONT), size)
    for column, words in enumerate(HEADER):
        middle = (_left(column, width) + width / 2, header / 2)
        draw.text(middle, words, fill=_INK, font=font, anchor='mm')
    return np.array(page)


def _row(sample: BaseDataElement) -> np.ndarray:
    """Give the three pictures (3, H, W, 3) of a sample."""
    original = displayable(sample.picture, sample.data_range)
    masked = paint_mask(original, sample.mask)
    reconstruction = displayable(sample.reconstruction, sample.data_range)
    return np.stack([original, masked, reconstruction])


def paint_mask(picture: np.ndarray, mask: Tensor) -> np.ndarray:
    """Paint the hidden patches of a picture grey.

    Args:
        picture: (H, W, 3), of type uint8.
        mask: (h, w), bool, True where a patch is hidden.

    Returns:
        The picture (H, W, 3) as FCMAE sees it.
    """
    patch = picture.shape[0] // mask.shape[0]
    hidden = mask.cpu().numpy().repeat(patch, 0).repeat(patch, 1)
    return np.where(hidden[..., None], np.uint8(_HIDDEN), picture)


def displayable(picture: Tensor, data_range: float = 255.0) -> np.ndarray:
    """Turn a picture of any number of channels into one that can be shown.

    Args:
        picture: (C, H, W). Of three and more channels the first three are shown as red,
            green and blue, of fewer the first in grey.
        data_range: The pixel value that is shown as white; zero is black.

    Returns:
        RGB picture (H, W, 3) of type uint8.
    """
    channels = picture[:3] if len(picture) >= 3 else picture[:1].expand(3, -1, -1)
    values = channels.float() * (255 / data_range)
    values = values.round().clamp(0, 255).to('cpu', torch.uint8)
    return values.permute(1, 2, 0).contiguous().numpy()


@HOOKS.register_module()
@check_arguments
class ReconstructionVisualizationHook(Hook):
    """Draw reconstructions in validation and testing.

    They go to MMEngine's visualizer, and so to each of its backends: files,
    TensorBoard, and others. A batch keeps its name from one validation to the next, so
    TensorBoard shows how the same pictures get better.

    Args:
        draw: Whether to draw at all. ``tools/test.py`` switches it on for ``--show``
            and ``--show-dir``.
        interval: Draw the first batch and each that is a multiple of this later.
        num_pictures: The greatest number of pictures to draw of a batch, one a row;
            None draws all.
        show: Whether to open a window with each grid too.
        wait_time: Seconds to show it for; 0 is until a key is pressed.
        test_out_dir: In testing, a folder for the grids in place of the visualizer's
            backends; a relative one is within the log folder of the run.
    """

    def __init__(
        self,
        draw: bool = True,
        interval: int = 50,
        num_pictures: int | None = 8,
        show: bool = False,
        wait_time: float = 0.0,
        test_out_dir: str | None = None,
    ) -> None:
        self.draw = draw
        self.interval = interval
        self.num_pictures = num_pictures
        self.show = show
        self.wait_time = wait_time
        self.test_out_dir = test_out_dir

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[BaseDataElement] | None = None,
    ) -> None:
        """Draw the reconstructions of a batch in validation."""
        if outputs and self._is_due(batch_idx):
            name, grid = f'val_reconstruction_{batch_idx}', self._grid(outputs)
            runner.visualizer.add_image(name, grid, runner.iter)
            self._show(runner, name, grid)

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[BaseDataElement] | None = None,
    ) -> None:
        """Draw the reconstructions of a batch in testing."""
        if not outputs or not self._is_due(batch_idx):
            return
        name, grid = f'test_reconstruction_{batch_idx}', self._grid(outputs)
        if self.test_out_dir is None:
            # Without a step: asking the runner would build the training data for it.
            runner.visualizer.add_image(name, grid)
        else:
            folder = Path(runner.log_dir, self.test_out_dir)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grid).save(folder / f'{name}.png')
        self._show(runner, name, grid)

    def _is_due(self, batch_idx: int) -> bool:
        # The visualizer takes pictures from the main process alone.
        return self.draw and batch_idx % self.interval == 0 and is_main_process()

    def _grid(self, outputs: Sequence[BaseDataElement]) -> np.ndarray:
        return reconstruction_grid(outputs[: self.num_pictures])

    def _show(self, runner: Runner, name: str, grid: np.ndarray) -> None:
        if self.show:
            runner.visualizer.show(grid, name, self.wait_time)
