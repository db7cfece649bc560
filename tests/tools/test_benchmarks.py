"""The benchmarks run, and their figures are of what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_encoder(tmp_path: Path) -> None:
    small = ['--arch', 'atto', '--size', '160', '--batch-size', '1', '--rounds', '1']
    what = ['--mask-ratios', '0.6', '0.8', '--sparse', 'packed', '--device', 'cpu']
    file = tmp_path / 'figures.json'
    tool = ROOT / 'tools' / 'benchmarks' / 'encoder.py'
    command = [sys.executable, tool, *small, *what, '--json', file]
    output = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE
    ).stdout
    rows = json.loads(file.read_text())['rows']
    seen = [(row['encoder'], row['mask_ratio'], row['limit']) for row in rows]
    assert seen == [
        ('dense', 0.0, 1.0),
        ('packed', 0.6, pytest.approx(25 / 10)),
        ('packed', 0.8, pytest.approx(25 / 5)),
    ]
    # What a step holds at its peak shrinks with what it sees, and is no secret.
    dense, some, few = (row['peak_mib'] for row in rows)
    assert 10 < dense < 100
    assert few < some < 0.7 * dense
    assert all(row['fastest'] <= row['seconds'] <= row['slowest'] for row in rows)
    assert output.count('| packed |') == 2


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
def test_growth(
    tools_folder: Path, tmp_path: Path, leaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    tool = str(ROOT / 'tools' / 'benchmarks' / 'growth.py')
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
