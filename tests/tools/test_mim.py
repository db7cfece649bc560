"""What ``docs/mim.md`` says MIM does."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mmcnv2.datasets.demo_scenes import make_demo_scenes

from .test_openmmlab import COUNTS, SEGMENTOR, of_scenes

pytestmark = pytest.mark.skipif(
    find_spec('mim') is None, reason='MIM is absent: pip install openmim'
)


def mim(folder: Path, *args: object) -> str:
    """Run MIM in a folder; return what it prints."""
    program = Path(sys.executable).with_name('mim')
    done = subprocess.run(
        [str(program), *map(str, args)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ('library', 'config', 'last', 'score'),
    [
        ('mmdet', 'det', 'epoch_1', 'coco/segm_mAP'),
        ('mmseg', 'seg', 'iter_4', 'mIoU'),
    ],
)
def test_trains_and_tests(tools_folder, tmp_path, library, config, last, score):
    where = ['--work-dir', tmp_path]
    mim(tools_folder, 'train', library, f'{config}.py', *where)
    checkpoint = tmp_path / f'{last}.pth'
    given = ['--checkpoint', checkpoint, *where]
    assert f'{score}: ' in mim(tools_folder, 'test', library, f'{config}.py', *given)
    weights = torch.load(checkpoint, weights_only=True)['state_dict']
    assert 'backbone.stages.0.0.grn.gamma' in weights


def test_finds_recipes_by_name(tmp_path):
    scenes = make_demo_scenes(tmp_path / 'scenes', counts=COUNTS)
    settings = [*of_scenes(scenes), 'train_cfg.max_iters=2']
    settings += ['default_hooks.checkpoint.interval=2']
    mim(tmp_path, 'train', 'mmcnv2', SEGMENTOR, '--cfg-options', *settings)
    checkpoint = Path('work_dirs', Path(SEGMENTOR).stem, 'iter_2.pth')
    given = ['--checkpoint', checkpoint, '--cfg-options', *settings]
    assert 'mIoU: ' in mim(tmp_path, 'test', 'mmcnv2', SEGMENTOR, *given)


def test_runs_tools_and_finds_metafiles(tools_folder, tmp_path):
    printed = mim(tools_folder, 'run', 'mmcnv2', 'print_config', 'seg.py')
    assert "type='mmcnv2.ConvNeXtV2'" in printed
    name = 'upernet_convnextv2-tiny_160k_ade20k-512x512'
    assert 'ade20k' in mim(tmp_path, 'search', 'mmcnv2', '--config', name)
