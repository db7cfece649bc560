"""Tools as processes that start at once: where they run, what they say, their end."""

import json
import signal
from pathlib import Path

import pytest

from mmcnv2.engine.jobs import start_tool, stop_tool

TELL = """
import json, os, sys
at_once = {'mmdet.models', 'mmseg.models'} <= sys.modules.keys()
found = [os.getcwd(), os.environ.get('MMCNV2_TEST'), sys.argv, __name__, at_once]
print(json.dumps(found))
print('no picture', file=sys.stderr)
sys.exit(3)
"""


def test_a_tool_runs_as_if_started_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'tell.py').write_text(TELL)
    (tmp_path / 'log').write_text('what an earlier run has left, and is longer\n' * 9)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MMCNV2_TEST', 'here')
    job = start_tool(['tell.py', '--size', '7'], tmp_path / 'log')
    job.join()
    assert job.exitcode == 3
    first, second = (tmp_path / 'log').read_text().splitlines()
    expected = [str(tmp_path), 'here', ['tell.py', '--size', '7'], '__main__', True]
    assert json.loads(first) == expected
    assert second == 'no picture'


def test_a_tool_is_stopped_also_when_it_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / 'nap.py').write_text('import time\ntime.sleep(600)')
    for _ in range(5):
        job = start_tool([str(tmp_path / 'nap.py')], tmp_path / 'log')
        stop_tool(job)
        job.join(60)
        assert job.exitcode == -signal.SIGTERM
