"""Runs that are stopped from outside: nothing hangs, and no process is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from .conftest import ROOT

# Writes the numbers of the process and of its loader workers, and lets the others run
# into the next collective alone.
PAUSE = """
import multiprocessing
import os
import time
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Pause(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter != 2 or get_rank() != runner.world_size - 1:
            return
        pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
        unfinished = Path(runner.work_dir, 'unfinished')
        unfinished.write_text(' '.join(map(str, pids)))
        unfinished.rename(unfinished.with_name('pids'))
        time.sleep(300)
"""

CONFIG = """
_base_ = '{folder}/fcmae.py'
custom_imports = dict(imports=['mmcnv2', 'pause'])
custom_hooks = [dict(type='mmengine.Pause')]
train_cfg = dict(max_epochs=9)
train_dataloader = dict(num_workers=2)
"""

Start = Callable[..., tuple[subprocess.Popen, list[psutil.Process]]]


@pytest.fixture
def start(tools_folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Start pre-training with two loader workers, and wait until it pauses.

    It returns the process, and that one which pauses with its workers.
    """
    (tmp_path / 'pause.py').write_text(PAUSE)
    (tmp_path / 'config.py').write_text(CONFIG.format(folder=tools_folder))
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    everything: list[psutil.Process] = []

    def start(*command: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
        with (tmp_path / 'log').open('w') as log:
            run = subprocess.Popen(
                command,
                env={**os.environ, 'PATH': path, 'PYTHONPATH': f'{tmp_path}:{ROOT}'},
                cwd=tmp_path,
                stdout=log,
                stderr=subprocess.STDOUT,
                # As a terminal does, whose Ctrl-C goes to all of the group.
                start_new_session=True,
            )
        everything.append(psutil.Process(run.pid))
        while not (tmp_path / 'pids').exists():
            assert run.poll() is None, (tmp_path / 'log').read_text()
            time.sleep(0.1)
        everything.extend(everything[0].children(recursive=True))
        pids = (tmp_path / 'pids').read_text().split()
        return run, [psutil.Process(int(pid)) for pid in pids]

    yield start
    _, alive = psutil.wait_procs(everything, timeout=20)
    for process in alive:
        process.kill()
    assert not alive, (tmp_path / 'log').read_text()


@pytest.mark.parametrize(
    ('victim', 'port', 'message'),
    [
        (0, '29541', 'Signal 9 (SIGKILL) received by PID {}'),
        (1, '29543', 'DataLoader worker (pid {}) is killed by signal: Killed'),
    ],
    ids=['process', 'loader worker'],
)
def test_when_one_of_two_dies_the_other_ends(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    victim: int,
    port: str,
    message: str,
) -> None:
    monkeypatch.setenv('PORT', port)
    script = str(ROOT / 'tools' / 'dist_train.sh')
    run, second = start('bash', script, 'config.py', '2', '--work-dir', '.')
    second[victim].kill()
    # The first waits for it in a collective.
    assert run.wait(timeout=60) != 0
    assert message.format(second[victim].pid) in (tmp_path / 'log').read_text()


def test_ctrl_c_ends_every_worker(start: Start, tmp_path: Path) -> None:
    script = str(ROOT / 'tools' / 'train.py')
    run, (_, *workers) = start(sys.executable, script, 'config.py', '--work-dir', '.')
    assert len(workers) == 2
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(timeout=60) == -signal.SIGINT
    assert 'KeyboardInterrupt' in (tmp_path / 'log').read_text()
