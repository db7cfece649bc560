"""What is removed, what stays, and what is resumed from when files are broken."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner

from mmcnv2.engine.checkpoint import PARTIAL, find_resumable, write_whole
from mmcnv2.registry import HOOKS

from .test_checkpoint import Regression, loader


class Rising(BaseMetric):
    """A score that each validation finds better than the last."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(1)

    def compute_metrics(self, results: list) -> dict[str, float]:
        self.score = getattr(self, 'score', 0) + 1
        return {'score': self.score}


def train(
    work_dir: Path, epochs: int, resume: str | None = None, **settings: Any
) -> Runner:
    runner = Runner(
        Regression(),
        str(work_dir),
        train_dataloader=loader(),
        train_cfg={'by_epoch': True, 'max_epochs': epochs},
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.1}},
        val_dataloader=loader(),
        val_evaluator=[Rising()],
        val_cfg={},
        default_hooks={
            'checkpoint': {'type': 'mmcnv2.CheckpointHook', 'interval': 1, **settings}
        },
        experiment_name=uuid4().hex,
        load_from=resume,
        resume=resume is not None,
    )
    runner.train()
    return runner


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob('*.pth'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of which two checkpoints are kept, and the best one."""
    folder = tmp_path_factory.mktemp('trained')
    train(folder, 3, max_keep_ckpts=2, save_best='score', rule='greater')
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Copy that run, the oldest file first."""
    best, *others = names(trained)
    for seconds, name in enumerate([*others, best]):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
        os.utime(tmp_path / name, (seconds, seconds))
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_3.pth'))
    return tmp_path


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(max_keep=2), "no argument 'max_keep'"),
        (dict(interval='2'), "interval of CheckpointHook is '2'"),
        (dict(stop_if_not_saved='no'), "stop_if_not_saved of CheckpointHook is 'no'"),
    ],
)
def test_wrong_settings_are_refused_when_it_is_built(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        HOOKS.build(dict(type='mmcnv2.CheckpointHook', **settings))


def test_outdated_ones_are_removed(trained: Path) -> None:
    assert names(trained) == ['best_score_epoch_3.pth', 'epoch_2.pth', 'epoch_3.pth']
    assert (trained / 'last_checkpoint').read_text() == str(trained / 'epoch_3.pth')
    assert not list(trained.glob(f'*{PARTIAL}'))


def test_the_best_one_stays_until_there_is_a_better_one(tmp_path: Path) -> None:
    # A folder in its place: the second best one cannot be written.
    (tmp_path / f'best_score_epoch_2.pth{PARTIAL}').mkdir()
    train(tmp_path, 2, save_best='score', rule='greater')
    assert names(tmp_path) == ['best_score_epoch_1.pth', 'epoch_1.pth', 'epoch_2.pth']


def test_the_best_one_of_a_run_elsewhere_stays(tmp_path: Path) -> None:
    best = dict(save_best='score', rule='greater')
    train(tmp_path / 'first', 1, **best)
    last = str(tmp_path / 'first' / 'epoch_1.pth')
    train(tmp_path / 'second', 3, resume=last, **best)
    assert (tmp_path / 'first' / 'best_score_epoch_1.pth').exists()
    assert names(tmp_path / 'second')[0] == 'best_score_epoch_3.pth'


def test_of_a_copied_run_its_own_is_resumed_from(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / 'copied'
    shutil.copytree(run, copied)
    assert find_resumable(str(copied)) == str(copied / 'epoch_3.pth')
    os.truncate(copied / 'epoch_3.pth', 100)
    assert find_resumable(str(copied)) == str(copied / 'epoch_2.pth')


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / 'epoch_1.pth'
    write_whole(path, b'whole')
    path.with_name(path.name + PARTIAL).mkdir()
    with pytest.raises(OSError, match='Is a directory'):
        write_whole(path, b'other')
    assert path.read_bytes() == b'whole'


def test_the_last_one_is_resumed_from(run: Path) -> None:
    assert find_resumable(str(run)) == str(run / 'epoch_3.pth')
    # An interrupted one may be older by name, and newer by time.
    (run / 'epoch_2.pth').rename(run / 'interrupted.pth')
    (run / 'last_checkpoint').write_text(str(run / 'interrupted.pth'))
    assert find_resumable(str(run)) == str(run / 'interrupted.pth')


@pytest.mark.parametrize('share', [0.0, 0.5, 0.99])
def test_a_truncated_one_is_skipped(
    run: Path, share: float, log: pytest.LogCaptureFixture
) -> None:
    broken = run / 'epoch_3.pth'
    os.truncate(broken, int(share * broken.stat().st_size))
    assert find_resumable(str(run)) == str(run / 'epoch_2.pth')
    assert f'Skipped: Cannot read {broken}' in log.text
    assert 'epoch_2.pth' not in log.text


@pytest.mark.parametrize('note', ['', 'elsewhere/epoch_9.pth', None])
def test_without_a_note_of_use_the_newest_is_taken(run: Path, note: str | None) -> None:
    (run / 'last_checkpoint').unlink()
    if note is not None:
        (run / 'last_checkpoint').write_text(note)
    # The best one is newer, but has no state of the optimizer.
    assert 'optimizer' not in torch.load(
        run / 'best_score_epoch_3.pth', weights_only=True
    )
    assert find_resumable(str(run)) == str(run / 'epoch_3.pth')


def test_none_that_can_be_read(run: Path) -> None:
    for path in run.glob('epoch_*.pth'):
        os.truncate(path, 100)
    with pytest.raises(SystemExit, match=r'none of the checkpoints in .* can be read'):
        find_resumable(str(run))


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert find_resumable(str(tmp_path)) is None


def test_who_handled_sigterm_before_does_so_again(tmp_path: Path) -> None:
    def handler(*_: Any) -> None:
        """One of the program that trains."""

    before = signal.signal(signal.SIGTERM, handler)
    try:
        train(tmp_path / 'whole', 1)
        assert signal.getsignal(signal.SIGTERM) is handler
        with pytest.raises(KeyError, match='no_such_score'):
            train(tmp_path / 'failing', 1, save_best='no_such_score', rule='greater')
        train(tmp_path / 'next', 1)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
