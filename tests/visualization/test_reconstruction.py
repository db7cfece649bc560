"""What the grid shows, pixel by pixel, and where the hook sends it."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset

from mmcnv2.visualization import reconstruction_grid

MASK = torch.tensor([[True, False, False, True, False, False]] * 3)
GREY = 128


def sample(seed: int = 0, channels: int = 3, mask: torch.Tensor = MASK) -> Any:
    generator = torch.Generator().manual_seed(seed)
    size = [32 * side for side in mask.shape]
    # Beyond what can be shown on either side.
    both = torch.rand(2, channels, *size, generator=generator) * 400 - 70
    element = BaseDataElement(metainfo={'data_range': 255.0})
    element.set_data(
        {'mask': mask, 'picture': both[0], 'reconstruction': both[1], 'loss': 0.5}
    )
    return element


def shown(picture: torch.Tensor) -> np.ndarray:
    return np.rint(np.clip(picture.numpy(), 0, 255)).astype(np.uint8).transpose(1, 2, 0)


def cells(grid: np.ndarray, rows: int, height: int, width: int) -> np.ndarray:
    """Cut the cells (rows, 3, height, width, 3) out, from the lower right corner up."""
    gap = 4
    found = []
    for row in reversed(range(rows)):
        bottom = grid.shape[0] - gap - row * (height + gap)
        strip = grid[bottom - height : bottom]
        starts = [gap + column * (width + gap) for column in range(3)]
        found.append([strip[:, left : left + width] for left in starts])
    assert grid.shape[1] == 3 * width + 4 * gap
    return np.array(found)


def test_cells_show_the_pictures():
    samples = [sample(0), sample(1)]
    grid = reconstruction_grid(samples)
    assert grid.dtype == np.uint8
    hidden = np.kron(MASK.numpy(), np.ones((32, 32), bool))
    for row, each in zip(cells(grid, 2, 96, 192), samples, strict=True):
        original, masked, reconstruction = row
        assert np.array_equal(original, shown(each.picture))
        assert np.array_equal(reconstruction, shown(each.reconstruction))
        assert (masked[hidden] == GREY).all()
        assert np.array_equal(masked[~hidden], original[~hidden])


@pytest.mark.parametrize(
    ('channels', 'order'), [(1, [0] * 3), (2, [0] * 3), (5, [0, 1, 2])]
)
def test_other_numbers_of_channels(channels, order):
    each = sample(channels=channels)
    (row,) = cells(reconstruction_grid([each]), 1, 96, 192)
    assert np.array_equal(row[0], shown(each.picture[order]))


def test_data_range():
    each = sample()
    twice = sample()
    twice.picture, twice.reconstruction = 257 * each.picture, 257 * each.reconstruction
    twice.set_metainfo({'data_range': 65535.0})
    grid = reconstruction_grid([twice])
    assert np.abs(grid.astype(int) - reconstruction_grid([each])).max() <= 1


def test_small_pictures_are_enlarged():
    each = sample(mask=torch.tensor([[True, False]]))
    (row,) = cells(reconstruction_grid([each]), 1, 96, 192)
    assert np.array_equal(row[0], np.kron(shown(each.picture), np.ones((3, 3, 1))))


def test_pictures_of_different_sizes():
    tall = sample(mask=torch.tensor([[True, False]] * 5))
    wide = sample(mask=torch.tensor([[False, True, False, True, False]]))
    grid = reconstruction_grid([tall, wide])
    assert grid.shape[1] == 3 * 160 + 4 * 4
    middle = grid[-4 - 32 - 4 - 160 : -4 - 32 - 4, 4 + 48 : 4 + 48 + 64]
    assert np.array_equal(middle, shown(tall.picture))
    assert np.array_equal(grid[-36:-4, 4:164], shown(wide.picture))


@pytest.mark.parametrize('patches', [1, 7, 32])
def test_header_is_set_within_its_columns(patches):
    """Dark words on white: some ink over each column, none over the gaps."""
    mask = torch.zeros(2, patches, dtype=torch.bool)
    grid = reconstruction_grid([sample(mask=mask)])
    width = (grid.shape[1] - 16) // 3
    header = grid[: grid.shape[0] - 8 - width * 2 // patches]
    ink = header.min(axis=(0, 2)) < 100
    for column in range(3):
        left = 4 + column * (width + 4)
        where = np.flatnonzero(ink[left : left + width])
        assert where.min() > 5
        assert where.max() < width - 5
        # In the middle.
        assert abs(where.min() + where.max() - width) < 8
    assert not ink[:: width + 4][:4].any()
    assert (header[:3] == 255).all()


class Numbers(Dataset):
    metainfo: dict = {}  # noqa: RUF012

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {'inputs': torch.tensor(index)}


class Predictions(BaseModel):
    """Stands in for a model: what it predicts is known beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, inputs: list[torch.Tensor], mode: str) -> Any:
        if mode == 'loss':
            return {'loss': self.weight.square()}
        return [sample(int(index)) for index in inputs]


def run(
    folder: Path, train: bool, backend: str = 'LocalVisBackend', **hook: Any
) -> Runner:
    loader = dict(dataset=Numbers(), batch_size=2, num_workers=0)
    loader['collate_fn'] = pseudo_collate
    loader['sampler'] = dict(type='DefaultSampler', shuffle=False)
    visualization = dict(type='mmcnv2.ReconstructionVisualizationHook', **hook)
    settings = dict(
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=2),
        val_cfg={},
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
    )
    if not train:
        settings = dict(test_dataloader=loader, test_cfg={})
    metric = dict(type='mmcnv2.ReconstructionMetric')
    runner = Runner(
        Predictions(),
        str(folder),
        **settings,
        **{'val_evaluator' if train else 'test_evaluator': metric},
        default_hooks=dict(checkpoint=None, visualization=visualization),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type=backend)]),
        experiment_name=folder.name,
    )
    runner.train() if train else runner.test()
    return runner


def drawn(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.rglob('*.png'))
    return {file.name: cv2.imread(str(file))[..., ::-1] for file in files}


def test_hook_in_validation(tmp_path):
    run(tmp_path, train=True, interval=2)
    found = drawn(tmp_path)
    # Three batches, the first and the third; three iterations an epoch.
    names = [f'val_reconstruction_{i}_{step}.png' for i in (0, 2) for step in (3, 6)]
    assert list(found) == names
    expected = reconstruction_grid([sample(4), sample(5)])
    assert np.array_equal(found['val_reconstruction_2_6.png'], expected)


def test_hook_draws_into_tensorboard(tmp_path):
    run(tmp_path, train=True, backend='TensorboardVisBackend')
    (events,) = tmp_path.rglob('events.out.tfevents.*')
    log = EventAccumulator(str(events), size_guidance=dict(images=0)).Reload()
    name = 'val_reconstruction_0'
    assert log.Tags()['images'] == [name]
    shown_at = log.Images(name)
    assert [each.step for each in shown_at] == [3, 6]
    bytes_ = np.frombuffer(shown_at[-1].encoded_image_string, np.uint8)
    picture = cv2.imdecode(bytes_, cv2.IMREAD_COLOR)[..., ::-1]
    assert np.array_equal(picture, reconstruction_grid([sample(0), sample(1)]))


def test_hook_in_testing(tmp_path):
    run(tmp_path, train=False, interval=1, num_pictures=1)
    found = drawn(tmp_path)
    assert list(found) == [f'test_reconstruction_{i}_0.png' for i in range(3)]
    expected = reconstruction_grid([sample(2)])
    assert np.array_equal(found['test_reconstruction_1_0.png'], expected)


def test_hook_with_a_folder_of_its_own(tmp_path):
    runner = run(tmp_path, train=False, test_out_dir='here')
    found = drawn(tmp_path)
    assert list(found) == ['test_reconstruction_0.png']
    assert np.array_equal(
        found['test_reconstruction_0.png'], reconstruction_grid([sample(0), sample(1)])
    )
    assert Path(runner.log_dir, 'here', 'test_reconstruction_0.png').is_file()


def test_hook_that_shall_not_draw(tmp_path):
    run(tmp_path, train=False, draw=False)
    assert drawn(tmp_path) == {}


def test_hook_shows_in_a_window(tmp_path, monkeypatch):
    """There is no screen here, so what would open the window takes note instead."""
    asked = []

    def show(self: Visualizer, *args: Any) -> None:
        asked.append(args)

    monkeypatch.setattr(Visualizer, 'show', show)
    run(tmp_path, train=False, show=True, wait_time=1.5)
    ((grid, name, wait_time),) = asked
    assert np.array_equal(grid, reconstruction_grid([sample(0), sample(1)]))
    assert (name, wait_time) == ('test_reconstruction_0', 1.5)
