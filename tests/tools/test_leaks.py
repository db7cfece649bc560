"""``leaks.py`` tells a run that grows from one that does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What holds on to a mebibyte and a file in each iteration, and a process in some.
LEAK = """
import subprocess

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Leak(Hook):
    held = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.held += [bytearray(2**20), open(__file__)]
        if self.every_n_train_iters(runner, 10):
            self.held.append(subprocess.Popen(['sleep', '60']))

    def after_train(self, runner):
        for each in self.held:
            if isinstance(each, subprocess.Popen):
                each.kill()
"""


@pytest.mark.parametrize('leaks', [False, True])
def test_leaks(tools_folder: Path, tmp_path: Path, leaks: bool) -> None:
    (tmp_path / 'leak.py').write_text(LEAK)
    (tmp_path / 'config.py').write_text(
        f"""
_base_ = '{tools_folder}/fcmae.py'
custom_imports = dict(imports=['mmcnv2', 'leak'])
custom_hooks = {[dict(type='mmengine.Leak')] * leaks}
train_cfg = dict(max_epochs=20)
train_dataloader = dict(num_workers=1, persistent_workers=True)
"""
    )
    tool = str(ROOT / 'tools' / 'benchmarks' / 'leaks.py')
    limits = ['--interval', '2', '--max-growth', '10']
    result = subprocess.run(
        [sys.executable, tool, 'config.py', *limits],
        env={**os.environ, 'PYTHONPATH': f'{tmp_path}:{ROOT}'},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode != 0) == leaks, result.stderr
    [line] = [each for each in result.stdout.splitlines() if 'growth: ' in each]
    memory, workers, files, processes = (
        float(part.split()[-1]) for part in line.split(', ')
    )
    assert abs(workers) < 10
    if leaks:
        # From the middle of the second quarter to that of the last: 40 iterations.
        assert 30 < memory < 60
        assert files == 40 + 4 * 3
        assert processes == 4
        assert 'It grows: main MiB, files, processes.' in result.stderr
