"""The commands of ``docs/mim.md``, one after the other, with settings that shorten."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ..test_commands import calls_of, folder  # noqa: F401
from ..test_tutorials import name_checkpoints
from .test_openmmlab import DETECTOR, SEGMENTOR, of_scenes, scenes  # noqa: F401

pytestmark = pytest.mark.skipif(
    find_spec('mim') is None, reason='MIM is absent: pip install openmim'
)
SHORT = {
    DETECTOR: ['train_cfg.max_epochs=1'],
    SEGMENTOR: ['train_cfg.max_iters=2', 'default_hooks.checkpoint.interval=2'],
}
# What each command says, by its beginning, or what it leaves behind.
EXPECTED = {
    'train mmcnv2': Path('work_dirs', Path(SEGMENTOR).stem, 'iter_2.pth'),
    'test mmcnv2': 'mIoU: ',
    'run mmcnv2 print_config': "type='mmcnv2.ConvNeXtV2'",
    'search mmcnv2': 'ade20k',
    'train mmdet': Path('work_dirs', Path(DETECTOR).stem, 'epoch_1.pth'),
    'test mmseg': 'mIoU: ',
}


def test_page(folder, scenes):  # noqa: F811
    Path('data').mkdir()
    Path('data', 'demo_scenes').symlink_to(scenes)
    Path('my_config.py').write_text(f"_base_ = 'configs/demo/{SEGMENTOR}'")
    calls = [args for name, *args in calls_of('docs/mim.md', folder) if name == 'mim']
    named = {arg for args in calls for arg in args if arg.startswith('work_dirs/')}
    for args, (command, expected) in zip(calls, EXPECTED.items(), strict=True):
        assert ' '.join(args).startswith(command)
        said = mim(*args, *shortening(args))
        if isinstance(expected, str):
            assert expected in said
        else:
            weights = torch.load(expected, weights_only=True)['state_dict']
            assert 'backbone.stages.0.0.grn.gamma' in weights
        name_checkpoints(named)


def mim(*args):
    """Run MIM; return what it prints."""
    program = Path(sys.executable).with_name('mim')
    done = subprocess.run(
        [str(program), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def shortening(args):
    config = next((each for each in args if Path(each).name in SHORT), None)
    if config is None:
        return []
    return ['--cfg-options', *of_scenes('data/demo_scenes'), *SHORT[Path(config).name]]
