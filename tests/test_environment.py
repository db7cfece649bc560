"""Importing mmcnv2 beside all kinds of installed packages, in real interpreters."""

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import packaging
import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALL = ROOT / 'docs' / 'install.md'
OPENMMLAB = {
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'mmdet': '3.3.0',
    'mmsegmentation': '1.2.2',
}
ONEDL = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
}
MODULES = {'mmdetection': 'mmdet', 'mmsegmentation': 'mmseg'}


@pytest.fixture(scope='module')
def installed_mmcnv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel of this checkout, with its metadata, into a folder."""
    source = tmp_path_factory.mktemp('source')
    ignored = shutil.ignore_patterns('.*', 'build', '*.egg-info', 'data', 'work_dirs')
    shutil.copytree(ROOT, source, ignore=ignored, dirs_exist_ok=True)
    target = tmp_path_factory.mktemp('target')
    pip = [sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation']
    # The kernels are of no interest here, and take the compiler a while.
    env = {**os.environ, 'CC': 'false', 'CXX': 'false'}
    command = [*pip, '--target', target, source]
    subprocess.run(command, env=env, check=True, capture_output=True)
    return target


class Environment:
    """A folder of packages, and a Python that sees it and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        source = Path(packaging.__file__).parent
        shutil.copytree(source, folder / 'packaging')
        for name in ('ftfy', 'regex'):
            self.add_module(name)

    def install(self, *, ops: bool = True, **versions: str) -> None:
        """Install packages that fail when imported, ``_`` standing for ``-``."""
        for key, version in versions.items():
            name = key.replace('_', '-')
            info = self.folder / f'{key}-{version}.dist-info'
            info.mkdir()
            metadata = f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
            (info / 'METADATA').write_text(metadata)
            module = name.removeprefix('onedl-')
            self.add_module(MODULES.get(module, module))
        if ops and (self.folder / 'mmcv').exists():
            suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
            (self.folder / 'mmcv' / f'_ext{suffix}').touch()

    def add_module(self, name: str) -> None:
        (self.folder / name).mkdir()
        code = f'raise SystemExit("reached {name}")\n'
        (self.folder / name / '__init__.py').write_text(code)

    def import_mmcnv2(self) -> str:
        """Import mmcnv2 and return what Python says when it fails."""
        result = subprocess.run(
            # -S hides the packages of the Python that runs the tests.
            [sys.executable, '-S', '-c', 'import mmcnv2'],
            env={'PYTHONPATH': str(self.folder)},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        return result.stderr.strip()


@pytest.fixture
def environment(installed_mmcnv2: Path, tmp_path: Path) -> Environment:
    environment = Environment(tmp_path / 'packages')
    shutil.copytree(installed_mmcnv2, environment.folder, dirs_exist_ok=True)
    return environment


def as_keywords(versions: dict[str, str]) -> dict[str, str]:
    return {name.replace('-', '_'): version for name, version in versions.items()}


# Python gets past the check and as far as MMEngine, the first of the packages.
PASSED = 'reached mmengine'


def test_openmmlab_family_passes(environment: Environment) -> None:
    environment.install(**OPENMMLAB)
    environment.add_module('pkg_resources')
    assert environment.import_mmcnv2() == PASSED


def test_onedl_family_passes_without_pkg_resources(environment: Environment) -> None:
    environment.install(**as_keywords(ONEDL))
    assert environment.import_mmcnv2() == PASSED


def test_mmsegmentation_without_what_it_imports(environment: Environment) -> None:
    environment.install(**OPENMMLAB)
    environment.add_module('pkg_resources')
    shutil.rmtree(environment.folder / 'ftfy')
    message = environment.import_mmcnv2()
    assert 'mmsegmentation needs ftfy, not installed. Run: pip install ftfy' in message


def test_a_tool_shows_the_message_first(environment: Environment) -> None:
    result = subprocess.run(
        [sys.executable, '-S', ROOT / 'tools' / 'train.py', 'config.py'],
        env={'PYTHONPATH': str(environment.folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'mmengine is not installed. Run: pip install' in result.stderr


def test_mmengine_alone_passes(environment: Environment) -> None:
    environment.install(onedl_mmengine='0.10.12')
    assert environment.import_mmcnv2() == PASSED


def test_all_wrong_versions_stand_in_one_message(environment: Environment) -> None:
    environment.install(mmengine='0.10.7', mmcv='2.2.0', mmdet='3.2.0', torch='1.13.1')
    environment.add_module('pkg_resources')
    message = environment.import_mmcnv2()
    assert message.count('ImportError: ') == 1
    assert 'ImportError: mmcnv2 cannot work with what is installed' in message
    assert '- mmcv 2.2.0 is installed, mmcv<2.2.0,>=2.1.0 is needed.' in message
    assert 'pip install --no-build-isolation "mmcv<2.2.0,>=2.1.0"' in message
    assert '- mmdet 3.2.0 is installed, mmdet<4,>=3.3.0 is needed.' in message
    assert '- torch 1.13.1 is installed, torch>=' in message
    assert '- mmengine' not in message


def test_wrong_version_of_the_fork(environment: Environment) -> None:
    environment.install(**as_keywords({**ONEDL, 'onedl-mmcv': '2.2.0'}))
    message = environment.import_mmcnv2()
    assert '- onedl-mmcv 2.2.0 is installed, onedl-mmcv<3,>=2.3.6 is needed' in message


def test_families_do_not_mix(environment: Environment) -> None:
    environment.install(**OPENMMLAB)
    environment.add_module('pkg_resources')
    shutil.rmtree(environment.folder / 'mmengine')
    environment.install(onedl_mmengine='0.10.12')
    message = environment.import_mmcnv2()
    assert 'keep one family' in message
    uninstall = 'pip uninstall -y mmengine mmcv mmdet mmsegmentation onedl-mmengine &&'
    assert uninstall in message


@pytest.mark.parametrize(
    ('family', 'wanted'),
    [(OPENMMLAB, '"mmcv<2.2.0,>=2.1.0"'), (ONEDL, '"onedl-mmcv<3,>=2.3.6"')],
    ids=['openmmlab', 'onedl'],
)
def test_mmcv_without_ops(
    environment: Environment, family: dict[str, str], wanted: str
) -> None:
    environment.install(ops=False, **as_keywords(family))
    environment.add_module('pkg_resources')
    message = environment.import_mmcnv2()
    assert 'has no compiled operators, which mmdet and mmseg need' in message
    assert '--no-build-isolation --no-cache-dir --force-reinstall --no-deps' in message
    assert message.endswith(wanted)


def test_mmcv_without_ops_is_fine_for_pretraining(environment: Environment) -> None:
    environment.install(ops=False, mmengine='0.10.7', mmcv='2.1.0')
    environment.add_module('pkg_resources')
    assert environment.import_mmcnv2() == PASSED


def test_setuptools_without_pkg_resources(environment: Environment) -> None:
    environment.install(**OPENMMLAB, setuptools='82.0.0')
    message = environment.import_mmcnv2()
    assert 'mmengine 0.10.7 imports pkg_resources, and setuptools 82.0.0' in message
    assert 'pip install "setuptools<81"' in message


def test_no_mmengine(environment: Environment) -> None:
    message = environment.import_mmcnv2()
    assert 'mmengine is not installed' in message
    assert 'pip install --no-build-isolation "mmengine<1,>=0.10.7"' in message


def test_source_tree_without_metadata_checks_no_versions(
    environment: Environment,
) -> None:
    environment.install(mmengine='0.1.0')
    environment.add_module('pkg_resources')
    assert 'mmengine 0.1.0 is installed' in environment.import_mmcnv2()
    [metadata] = environment.folder.glob('mmcnv2-*.dist-info')
    shutil.rmtree(metadata)
    assert environment.import_mmcnv2() == PASSED


def test_the_guide_quotes_what_is_said(
    environment: Environment, installed_mmcnv2: Path, tmp_path: Path
) -> None:
    shutil.rmtree(environment.folder / 'ftfy')
    shutil.rmtree(environment.folder / 'regex')
    found = {**OPENMMLAB, 'mmcv': '2.2.0'}
    environment.install(ops=False, setuptools='82.0.0', **found)
    said = environment.import_mmcnv2()
    mixed = Environment(tmp_path / 'mixed')
    shutil.copytree(installed_mmcnv2, mixed.folder, dirs_exist_ok=True)
    said += f'\n{mixed.import_mmcnv2()}'
    mixed.install(**OPENMMLAB)
    shutil.rmtree(mixed.folder / 'mmengine')
    mixed.install(onedl_mmengine='0.10.12')
    said += f'\n{mixed.import_mmcnv2()}'
    said = said.replace(str(environment.folder), '.../site-packages')
    blocks = re.findall(r'```text\n(.*)\n```', INSTALL.read_text())
    assert len(blocks) == 6
    assert [line for line in blocks if line not in said.splitlines()] == []
