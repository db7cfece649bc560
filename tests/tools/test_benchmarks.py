"""The benchmarks run, and their figures are of what they say."""

import json
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
