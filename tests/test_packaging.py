"""What a wheel holds, and that ``mmcnv2::`` finds configs however it is installed."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = "_base_ = ['mmcnv2::toy/base.py', 'mmseg::_base_/schedules/schedule_20k.py']"
LOAD = """
import mmcnv2
from mmengine.config import Config
cfg = Config.fromfile('config.py')
print(cfg.toy, cfg.train_cfg.type)
"""
COMPILED = 'from mmcnv2.models import kernels; print(kernels.are_compiled())'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Copy the checkout, without what earlier builds left in it, and add a config."""
    source = tmp_path / 'source'
    left = ('.*', 'build', '*.egg-info', '*.so', 'data', 'work_dirs')
    ignored = shutil.ignore_patterns(*left)
    shutil.copytree(ROOT, source, ignore=ignored)
    (source / 'configs' / 'toy').mkdir()
    (source / 'configs' / 'toy' / 'base.py').write_text("toy = 'as installed'")
    return source


class Python:
    """A new virtual environment that also sees the packages of this one."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder)
        self.folder = folder
        [packages] = folder.glob('lib/python*/site-packages')
        # Not what is installed here in place: that would be found first.
        outer = [path for path in sys.path if path.endswith('-packages')]
        (packages / 'outer.pth').write_text('\n'.join(outer))

    def run(self, *args: str | Path) -> str:
        result = subprocess.run(
            [self.folder / 'bin' / 'python', *args],
            cwd=self.folder,
            env={key: os.environ[key] for key in os.environ if key != 'PYTHONPATH'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    def pip(self, *args: str | Path) -> str:
        alone = ['--no-deps', '--no-build-isolation', '--ignore-installed']
        return self.run('-m', 'pip', 'install', *alone, *args)

    def load_config(self) -> str:
        (self.folder / 'config.py').write_text(BASE)
        return self.run('-W', 'ignore', '-c', LOAD).strip()


def test_wheel(source: Path, tmp_path: Path) -> None:
    wheels = tmp_path / 'wheels'
    build = ['--no-deps', '--no-build-isolation', '--wheel-dir', wheels, source]
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', *build], check=True)
    [wheel] = wheels.iterdir()
    names = set(ZipFile(wheel).namelist())
    expected = {
        f'mmcnv2/.mim/{path.relative_to(source).as_posix()}'
        for folder in ('configs', 'tools')
        for path in (source / folder).rglob('*')
        if path.is_file()
    }
    assert 'mmcnv2/.mim/tools/train.py' in expected
    assert {*expected, 'mmcnv2/.mim/model-index.yml'} <= names
    assert not (source / 'mmcnv2' / '.mim').exists(), 'copies would shadow later edits'

    python = Python(tmp_path / 'environment')
    python.pip(wheel)
    assert python.load_config() == 'as installed IterBasedTrainLoop'
    assert python.run('-W', 'ignore', '-c', COMPILED).strip() == 'True'


def test_in_place_and_without_a_compiler(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ('CC', 'CXX'):
        monkeypatch.setenv(name, 'false')
    python = Python(tmp_path / 'environment')
    python.pip('--editable', source)
    assert python.load_config() == 'as installed IterBasedTrainLoop'
    (source / 'configs' / 'toy' / 'base.py').write_text("toy = 'edited'")
    assert python.load_config() == 'edited IterBasedTrainLoop'
    assert python.run('-W', 'ignore', '-c', COMPILED).strip() == 'False'


def test_ci_runs_the_documented_commands() -> None:
    script = (ROOT / '.ci' / 'run').read_text()
    commands = re.findall(
        r'^(?:MMCNV2_\w+=\d+ )?(?:pip|bash|ruff|mypy|pytest).*$', script, re.MULTILINE
    )
    assert len(commands) == 16
    guides = [(ROOT / name).read_text() for name in ('README.md', 'CONTRIBUTING.md')]
    readme, contributing = (set(guide.splitlines()) for guide in guides)
    assert [line for line in commands if line not in readme | contributing] == []
    # Who installs and tests needs README.md alone; mmpretrain and MIM come later.
    lint = {'ruff check', 'ruff format --check', 'mypy'}
    assert set(commands[: commands.index('pytest') + 1]) - readme == lint
