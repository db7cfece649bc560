"""Runs that are killed, told to stop, or cannot write, and what becomes of them.

Each run is a fork of this process, so that signals and limits are real and imports are
done. It is resumed and compared, bit by bit, with one that nothing happened to.
"""

import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from mmcnv2.engine.checkpoint import PARTIAL

from ..commands import free_port
from .conftest import ROOT

SCRIPT = runpy.run_path(str(ROOT / 'tools' / 'kill_and_resume.py'))
import_library = SCRIPT['import_library']
outcome, differences = SCRIPT['outcome'], SCRIPT['differences']

Run = Callable[..., CompletedProcess]

# Of each task at random moments. CI takes more than there is time for in every run.
KILLS = int(os.environ.get('MMCNV2_KILLS', '2'))

HOOKS = """
custom_imports = dict(imports=['mmcnv2', 'incidents'])
custom_hooks = [
    dict(type='EMAHook'),
    dict(type='mmengine.Signal'),
    dict(type='mmengine.FullDisk')]
"""

# Three steps in two epochs: an epoch's checkpoint is written between two steps.
PRETRAINING = """
_base_ = 'fcmae.py'
{hooks}
model = dict(backbone=dict(drop_path_rate=0.5))
train_dataloader = dict(
    num_workers=2, persistent_workers=True, batch_size=1,
    dataset=dict(indices=3, pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.2, 1.0)),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackPretrainInputs')]))
val_dataloader = _base_.test_dataloader
val_evaluator = _base_.test_evaluator
val_cfg = dict()
train_cfg = dict(max_epochs=4, val_interval=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=5),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True)]
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', accumulative_counts=2,
    optimizer=dict(type='AdamW', lr=1e-3))
default_hooks = dict(
    logger=dict(interval=2), checkpoint=dict(interval=1, max_keep_ckpts=2))
"""

DETECTION = """
_base_ = 'det.py'
{hooks}
train_dataloader = dict(
    num_workers=2, batch_size=2,
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='RandomResize', scale=(96, 64), ratio_range=(0.7, 1.3)),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs')]))
train_cfg = dict(max_epochs=3)
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=3, max_keep_ckpts=2))
"""

# Without a seed in the config, with a sampler that ends, and with a loss scaler.
SEGMENTATION = """
_base_ = 'seg.py'
{hooks}
optim_wrapper = dict(type='mmengine.ScaledOptimWrapper')
model = dict(decode_head=dict(dropout_ratio=0.5))
train_dataloader = dict(
    num_workers=2, sampler=dict(type='DefaultSampler'),
    dataset=dict(pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PhotoMetricDistortion'),
        dict(type='PackSegInputs')]))
train_cfg = dict(max_iters=7)
"""

# What happens to a run, and when. Signals are real, and so are the limits of files.
INCIDENTS = '''
import os
import resource
import signal
import subprocess

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class ScaledOptimWrapper(AmpOptimWrapper):
    """MMEngine's, which makes a scaler on accelerators alone."""

    def __init__(self, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        self.cast_dtype = torch.bfloat16
        self.loss_scaler = torch.amp.GradScaler(
            'cpu', init_scale=2.0**10, growth_interval=2)


@HOOKS.register_module()
class Signal(Hook):
    def __init__(self, number=15, at=None, at_validation=None, group=False, rank=0):
        self.number, self.group, self.rank = number, group, rank
        self.iteration, self.val_iteration = at, at_validation

    def send(self):
        if self.group:
            # From elsewhere, for a worker does end if its parent says so.
            kill = ['kill', f'-{self.number}', '--', f'-{os.getpgrp()}']
            subprocess.run(kill, check=True, start_new_session=True)
        elif get_rank() == self.rank:
            os.kill(os.getpid(), self.number)

    def before_train_iter(self, runner, batch_idx, data_batch):
        if runner.iter == self.iteration:
            self.send()

    def before_val_iter(self, runner, batch_idx, data_batch):
        if batch_idx == self.val_iteration:
            self.send()


@HOOKS.register_module()
class FullDisk(Hook):
    def __init__(self, at=None, until=None, fatal=False):
        self.iteration, self.until, self.fatal = at, until, fatal

    def before_train_iter(self, runner, batch_idx, data_batch):
        if runner.iter == self.iteration:
            # Beyond its limit a write fails, or, as by default, the process is killed.
            if self.fatal:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        if runner.iter == self.until:
            limit = resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
'''


@pytest.fixture(scope='session')
def configs(tools_folder: Path) -> Path:
    """Hold ``pretrain.py``, ``detect.py`` and ``segment.py``."""
    texts = {'pretrain': PRETRAINING, 'detect': DETECTION, 'segment': SEGMENTATION}
    for name, text in texts.items():
        (tools_folder / f'{name}.py').write_text(text.replace('{hooks}', HOOKS))
    (tools_folder / 'incidents.py').write_text(INCIDENTS)
    return tools_folder


def train(configs: Path, argv: list[str], log: Path, env: dict[str, str]) -> None:
    os.setsid()
    sys.stdout = sys.stderr = open(log, 'a', buffering=1)  # noqa: SIM115
    os.environ.update(env)
    os.chdir(configs)
    sys.path.insert(0, str(configs))
    sys.argv = argv
    runpy.run_path(str(ROOT / 'tools' / 'train.py'), run_name='__main__')


class Runs:
    """Runs of a config, in folders below one."""

    def __init__(self, configs: Path, folder: Path, name: str) -> None:
        self.configs, self.folder, self.name = configs, folder, name
        for library in ('mmdet', 'mmseg'):
            import_library(library)

    def __call__(self, run: str, *settings: str, processes: int = 1) -> list[int]:
        """Train, or go on; return the exit codes."""
        work_dir = self.folder / run
        work_dir.mkdir(exist_ok=True)
        argv = ['train.py', f'{self.name}.py', '--work-dir', str(work_dir), '--resume']
        argv += ['--cfg-options', *settings] if settings else []
        argv += ['--launcher', 'pytorch'] if processes > 1 else []
        env = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
        started = []
        for rank in map(str, range(processes)):
            ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(processes))
            args = (self.configs, argv, work_dir / 'log', {**env, **ranks})
            process = get_context('fork').Process(target=train, args=args)
            process.start()
            started.append(process)
        for process in started:
            process.join()
        self.pids = [process.pid for process in started]
        return [process.exitcode for process in started]

    def log(self, run: str) -> str:
        return (self.folder / run / 'log').read_text()

    def last(self, run: str) -> Path:
        return Path((self.folder / run / 'last_checkpoint').read_text())

    def outcome(self, run: str) -> dict:
        return outcome(self.folder / run)


def signal_to(**settings: object) -> list[str]:
    return [f'custom_hooks.1.{key}={value}' for key, value in settings.items()]


def full_disk(**settings: object) -> list[str]:
    return [f'custom_hooks.2.{key}={value}' for key, value in settings.items()]


def has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope='module')
def pretraining(configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Have pre-trained without an incident, in ``whole``."""
    runs = Runs(configs, tmp_path_factory.mktemp('pretraining'), 'pretrain')
    assert runs('whole') == [0]
    return runs


def assert_same_end(runs: Runs, run: str, whole: str = 'whole') -> None:
    assert runs(run) == [0], runs.log(run)
    expected = runs.outcome(whole)
    assert len(expected) > 100
    assert differences(expected, runs.outcome(run)) == []


@pytest.mark.parametrize('name', ['pretrain', 'detect'])
def test_killed_at_random_moments(
    name: str, run: Run, configs: Path, tmp_path: Path
) -> None:
    where = ['--work-dir', tmp_path / 'runs']
    output = run('kill_and_resume.py', f'{name}.py', '--kills', KILLS, *where).stdout
    assert output.count('kill ') == KILLS
    assert 'bit by bit' in output


def test_sigterm_within_an_epoch(pretraining: Runs) -> None:
    # The loader's workers get it too, as a cluster may have it.
    sigterm = signal_to(at=4, group=True)
    assert pretraining('told', *sigterm) == [143], pretraining.log('told')
    assert 'Stopped by SIGTERM after iteration 6.' in pretraining.log('told')
    assert pretraining.last('told').name == 'interrupted.pth'
    # The fifth iteration is the first of a step's two.
    meta = load(pretraining.last('told'))['meta']
    assert (meta['epoch'], meta['iter']) == (1, 6)
    assert_same_end(pretraining, 'told')
    assert 'Epoch(train) [2]' not in pretraining.log('told').split('resumed epoch')[1]


def test_sigterm_in_validation(pretraining: Runs) -> None:
    sigterm = signal_to(at_validation=1)
    assert pretraining('validating', *sigterm) == [143]
    assert 'Stopped by SIGTERM after iteration 6.' in pretraining.log('validating')
    assert_same_end(pretraining, 'validating')


# In seven steps the scale grows three times.
@pytest.mark.parametrize(('name', 'scale'), [('detect', None), ('segment', 2.0**13)])
def test_sigterm_to_other_tasks(
    name: str, scale: float | None, configs: Path, tmp_path: Path
) -> None:
    runs = Runs(configs, tmp_path, name)
    assert runs('whole') == [0]
    assert runs('told', *signal_to(at=4)) == [143]
    assert load(runs.last('told'))['meta']['iter'] == 5
    assert_same_end(runs, 'told')
    assert runs.outcome('told').get('/optimizer/loss_scaler/scale') == scale


def test_sigterm_to_one_of_two_processes(configs: Path, tmp_path: Path) -> None:
    runs = Runs(configs, tmp_path, 'pretrain')
    pair = lambda run, *settings: runs(run, *settings, processes=2)  # noqa: E731
    assert pair('whole') == [0, 0], runs.log('whole')
    assert pair('told', *signal_to(at=2, rank=1)) == [143, 143], runs.log('told')
    assert load(runs.last('told'))['meta']['iter'] == 4
    assert pair('told') == [0, 0]
    assert differences(runs.outcome('whole'), runs.outcome('told')) == []


def test_ctrl_c_ends_every_process(pretraining: Runs) -> None:
    assert pretraining('interrupted', *signal_to(number=2, at=4)) == [1]
    assert 'KeyboardInterrupt' in pretraining.log('interrupted')
    deadline = time.monotonic() + 10
    while has_processes(pretraining.pids[0]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not has_processes(pretraining.pids[0])


def test_killed_while_writing(pretraining: Runs) -> None:
    full = full_disk(at=7, fatal=True)
    assert pretraining('writing', *full) == [-signal.SIGXFSZ]
    folder = pretraining.folder / 'writing'
    assert (folder / f'epoch_3.pth{PARTIAL}').stat().st_size == 50_000
    assert sorted(folder.glob('*.pth')) == [folder / f'epoch_{i}.pth' for i in (1, 2)]
    assert pretraining.last('writing').name == 'epoch_2.pth'
    assert_same_end(pretraining, 'writing')
    assert not list(folder.glob(f'*{PARTIAL}'))


def test_a_full_disk(pretraining: Runs) -> None:
    assert pretraining('full', *full_disk(at=4, until=9)) == [0]
    message = 'could not be written ([Errno 27] File too large)'
    assert pretraining.log('full').count(message) == 2
    folder = pretraining.folder / 'full'
    assert sorted(path.name for path in folder.glob('*.pth*')) == [
        'epoch_1.pth',
        'epoch_4.pth',
    ]
    assert differences(pretraining.outcome('whole'), pretraining.outcome('full')) == []


def test_a_full_disk_that_stops_training(pretraining: Runs) -> None:
    stop = 'default_hooks.checkpoint.stop_if_not_saved=True'
    assert pretraining('stopped', *full_disk(at=4), stop) == [1]
    assert 'Training stops for it.' in pretraining.log('stopped')
    assert pretraining.last('stopped').name == 'epoch_1.pth'
    assert_same_end(pretraining, 'stopped')


def test_a_truncated_checkpoint_is_skipped(pretraining: Runs) -> None:
    folder = pretraining.folder / 'truncated'
    shutil.copytree(pretraining.folder / 'whole', folder)
    last = folder / 'epoch_4.pth'
    (folder / 'last_checkpoint').write_text(str(last))
    os.truncate(last, last.stat().st_size // 2)
    assert_same_end(pretraining, 'truncated')
    assert f'Skipped: Cannot read {last}' in pretraining.log('truncated')
    assert f'Load checkpoint from {folder}/epoch_3.pth' in pretraining.log('truncated')
