"""Broken files through MMEngine's Runner, its loader workers, and two processes."""

import logging
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import cv2
import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from mmcnv2.models import FCMAEDataPreprocessor
from mmcnv2.registry import HOOKS

# Not relative, for this is run as a script too.
from tests.commands import run_tool


class Mean(BaseModel):
    def __init__(self) -> None:
        super().__init__(FCMAEDataPreprocessor([128.0] * 3, [64.0] * 3))
        self.layer = nn.Linear(3, 1)

    def forward(self, inputs: torch.Tensor, data_samples: list, mode: str) -> dict:
        return {'loss': self.layer(inputs.mean((2, 3))).square().mean()}


def draw(folder: Path, good: int, broken: int) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(good):
        picture = np.full((32, 32, 3), i, np.uint8)
        cv2.imwrite(str(folder / f'{i:02}.png'), picture)
    for i in range(broken):
        (folder / f'broken{i}.jpg').write_bytes(b'' if i % 2 else b'no picture')
    return folder


def make_runner(
    folder: Path,
    by_epoch: bool = True,
    shuffle: bool = True,
    repeat: int = 1,
    epochs: int = 2,
    resume_from: str | None = None,
    **hook: Any,
) -> Runner:
    names = ['LoadImageFromFile', 'mmcnv2.PackPretrainInputs']
    dataset = dict(
        type='mmcnv2.UnlabelledImages',
        data_root=str(folder),
        pipeline=[dict(type=name) for name in names],
    )
    if repeat > 1:
        dataset = dict(type='RepeatDataset', dataset=dataset, times=repeat)
        dataset = dict(type='ConcatDataset', datasets=[dataset])
    length = dict(max_epochs=epochs) if by_epoch else dict(max_iters=10)
    return Runner(
        Mean(),
        str(folder.parent / 'work'),
        train_dataloader=dict(
            dataset=dataset,
            batch_size=3,
            # The iterator of the other loop outlives it, and then waits for workers.
            num_workers=2 if by_epoch else 0,
            sampler=dict(type='DefaultSampler', shuffle=shuffle),
        ),
        train_cfg=dict(by_epoch=by_epoch, **length),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=[dict(type='mmcnv2.BrokenImagesHook', **hook)],
        resume=resume_from is not None,
        load_from=resume_from,
        randomness=dict(seed=0),
        default_scope=None,
        experiment_name=uuid4().hex,
    )


def log_of(runner: Runner) -> str:
    return next(Path(runner.log_dir).glob('*.log')).read_text()


@pytest.mark.parametrize('by_epoch', [True, False])
def test_reports_and_goes_on(tmp_path, by_epoch):
    folder = draw(tmp_path / 'pictures', good=18, broken=2)
    runner = make_runner(folder, by_epoch, max_share=0.1)
    runner.train()
    assert runner.iter == (14 if by_epoch else 10)
    broken = [str(folder / f'broken{i}.jpg') for i in range(2)]
    listed = Path(runner.log_dir, 'broken_images.txt').read_text().splitlines()
    assert listed == broken
    log = log_of(runner)
    assert log.count('2 of 20 pictures could not be read') == (2 if by_epoch else 1)
    for path in broken:
        assert log.count(f'Cannot read the picture {path}') == 1


def test_stops_as_soon_as_too_many_are_broken(tmp_path):
    folder = draw(tmp_path / 'pictures', good=15, broken=5)
    runner = make_runner(folder, max_share=0.1)
    message = (
        r'[345] of 20 pictures .* max_share=0\.1 .*/broken\d\.jpg.* Mend or remove'
    )
    with pytest.raises(RuntimeError, match=message):
        runner.train()
    # Not at the end of the epoch.
    assert runner.epoch == 0
    assert runner.iter < 7


def test_share_is_of_files_however_often_they_are_taken(tmp_path):
    folder = draw(tmp_path / 'pictures', good=4, broken=1)
    runner = make_runner(folder, by_epoch=False, repeat=9, max_share=0.1)
    with pytest.raises(RuntimeError, match='1 of 5 pictures'):
        runner.train()


def test_resumed_run_knows_what_was_broken(tmp_path):
    folder = draw(tmp_path / 'pictures', good=4, broken=1)
    make_runner(folder, epochs=1, max_share=0.2).train()
    (tmp_path / 'work').rename(tmp_path / 'first')
    checkpoint = str(tmp_path / 'first' / 'epoch_1.pth')
    # Mended, so that it is not met again.
    (folder / 'broken0.jpg').write_bytes((folder / '00.png').read_bytes())
    runner = make_runner(folder, epochs=2, resume_from=checkpoint, max_share=0.2)
    runner.train()
    assert runner.iter == 4
    assert '1 of 5 pictures could not be read' in log_of(runner)


def test_no_broken_file_no_word(tmp_path, caplog):
    runner = make_runner(draw(tmp_path / 'pictures', 6, 0), max_share=0.0)
    with caplog.at_level(logging.WARNING):
        runner.train()
    assert 'could not be read' not in log_of(runner)
    assert not Path(runner.log_dir, 'broken_images.txt').exists()


@pytest.mark.parametrize('share', [-0.1, 1.5])
def test_share_out_of_range(share):
    with pytest.raises(ValueError, match='max_share'):
        HOOKS.build(dict(type='BrokenImagesHook', max_share=share))


def train_as_one_of_two(folder: Path) -> None:
    """Run in each of two processes, by ``test_two_processes``."""
    torch.distributed.init_process_group('gloo')
    # Each process meets one of the two broken files, and one of 40 is not too many.
    runner = make_runner(folder, shuffle=False, max_share=0.025)
    try:
        runner.train()
    except RuntimeError as error:
        print(f'epoch {runner.epoch} iter {runner.iter}: {error}')


def test_two_processes(tmp_path):
    folder = draw(tmp_path / 'pictures', good=38, broken=2)
    output = run_tool([__file__, str(folder)], tmp_path, processes=2).stdout
    # Twenty pictures of each process are seven batches: the end of the epoch.
    assert output.count('epoch 0 iter 7: 2 of 40 pictures') == 2, output


if __name__ == '__main__':
    train_as_one_of_two(Path(sys.argv[1]))
