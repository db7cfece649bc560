"""The commands of the README and the tutorials, one after the other, for real.

They run as they stand on tiny data, but for settings that make training short, and the
checkpoints that it ends with get the names that the page goes on with.
"""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmcnv2.engine.conversion import convert_weights
from mmcnv2.models import ConvNeXtV2

from .commands import run_tool
from .test_commands import calls_of, folder, write_configs  # noqa: F401

LOADERS = [
    f'{split}_dataloader.{setting}'
    for split in ('train', 'val', 'test')
    for setting in ('batch_size=2', 'num_workers=0', 'persistent_workers=False')
]
COUNTS = [
    f'{split}_dataloader.dataset.counts.{kind}=2'
    for split in ('train', 'val', 'test')
    for kind in ('train', 'val', 'unlabelled')
]


@pytest.fixture
def nuclei(folder: Path) -> None:  # noqa: F811
    """Draw nuclei where the pages have them, with their boxes and masks."""
    generator = np.random.default_rng(0)
    root = folder / 'data' / 'nuclei'
    (root / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (root / 'images' / split).mkdir(parents=True)
        pictures, nuclei = [], []
        for i in range(1, 3):
            picture = generator.integers(0, 50, (64, 64, 3), dtype=np.uint8)
            picture[16:48, 8:40] += 150
            cv2.imwrite(str(root / 'images' / split / f'{i}.png'), picture)
            pictures.append(dict(id=i, file_name=f'{i}.png', height=64, width=64))
            outline = [8, 16, 40, 16, 40, 48, 8, 48]
            where = dict(bbox=[8, 16, 32, 32], area=1024, segmentation=[outline])
            nuclei.append(dict(id=i, image_id=i, category_id=1, iscrowd=0, **where))
        content = dict(
            images=pictures,
            annotations=nuclei,
            categories=[dict(id=1, name='nucleus')],
        )
        path = root / 'annotations' / f'{split}.json'
        path.write_text(json.dumps(content))


def follow(page: str, where: Path, settings: dict[str, list[str]]) -> None:
    """Run what the page has for Python; settings are by what is in a config's name."""
    write_configs(page)
    for path in where.glob('my_pretraining.py'):
        path.write_text(path.read_text().replace('tiny_800e', 'atto_800e'))
    calls = [(program, args) for program, *args in calls_of(page, where)]
    for args in (args for program, args in calls if program == 'tensorboard'):
        serves(args)
    calls = [args for program, args in calls if program == 'python']
    named = {arg for args in calls for arg in args if arg.startswith('work_dirs/')}
    for args in calls:
        if args[0].endswith(('/train.py', '/test.py', '/browse_dataset.py')):
            (tiny,) = [v for name, v in settings.items() if name in args[1]]
            given = [] if '--cfg-options' in args else ['--cfg-options']
            # Only training has a loop to shorten.
            tiny = [s for s in tiny if 'train.py' in args[0] or 'train_cfg' not in s]
            args += [*given, *tiny]
        if args[0].endswith('/get_flops.py'):
            # The last of options that repeat is the one that counts.
            args += ['--shape', '64', '64']
        done = run_tool(args, where)
        assert done.returncode == 0, f'{args}\n{done.stdout}'
        name_checkpoints(named)


def serves(args: list[str]) -> None:
    """Start TensorBoard, and wait until it says where it is."""
    program = Path(sys.executable).with_name('tensorboard')
    command = [str(program), *args, '--port', '0']
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        said = next((line for line in server.stderr if 'http://' in line), '')
        server.terminate()
    assert 'TensorBoard' in said


def name_checkpoints(names: set[str]) -> None:
    for path in map(Path, names):
        last = path.parent / 'last_checkpoint'
        if last.exists() and not path.exists():
            path.symlink_to(last.read_text())


def test_readme(folder):  # noqa: F811
    # The page's own name for a run that stands for any.
    runs = folder / 'work_dirs'
    (runs / 'fcmae_convnextv2-atto_demo').mkdir(parents=True)
    (runs / 'my_pretraining').symlink_to(runs / 'fcmae_convnextv2-atto_demo')
    tiny = [*LOADERS, *COUNTS]
    settings = {
        'fcmae_convnextv2': [*tiny, 'train_cfg.max_epochs=1'],
        'mask-rcnn': [*tiny, 'train_cfg.max_epochs=1'],
        'upernet': [*tiny, 'train_cfg.max_iters=1'],
    }
    follow('README.md', folder, settings)
    for written in ('reconstructions', 'detections', 'maps', 'browsed'):
        assert list((folder / written).rglob('*.[jp][pn]g')), written
    assert (folder / 'model.safetensors').stat().st_size > 1e7


def test_pretraining(folder, nuclei):  # noqa: F811
    tiny = [*LOADERS, 'train_cfg.max_epochs=2']
    tiny += ['param_scheduler.0.end=1', 'param_scheduler.1.begin=1']
    follow('docs/pretrain.md', folder, {'my_pretraining': tiny})
    assert len(list((folder / 'reconstructions').iterdir())) == 2
    assert list((folder / 'work_dirs' / 'my_pretraining').rglob('events.out*'))


def test_own_data(folder, nuclei):  # noqa: F811
    tiny = [*LOADERS, 'model.backbone.arch=atto', 'model.backbone.init_cfg=None']
    tiny += ['model.neck.in_channels=[40,80,160,320]']
    tiny += ['optim_wrapper.type=OptimWrapper', 'train_cfg.max_epochs=1']
    tiny += [
        'model.roi_head.bbox_head.conv_out_channels=16',
        'model.roi_head.bbox_head.fc_out_channels=64',
        'model.roi_head.mask_head.conv_out_channels=16',
        'model.test_cfg.rpn.max_per_img=50',
    ]
    tiny += [
        f'{split}_dataloader.dataset.pipeline.{size}=(64,64)'
        for split, sizes in (
            ('train', ('2.scale', '3.crop_size')),
            ('val', ('1.scale',)),
            ('test', ('1.scale',)),
        )
        for size in sizes
    ]
    follow('docs/own_data.md', folder, {'my_config': tiny})
    assert len(list((folder / 'results').glob('*.png'))) == 2


def test_checkpoints(folder):  # noqa: F811
    weights = {f'backbone.{k}': v for k, v in ConvNeXtV2('atto').state_dict().items()}
    official = convert_weights(weights, 'official')
    torch.save({'model': official.weights}, 'convnextv2_tiny_1k_224_ema.pt')
    path = folder / 'work_dirs' / 'my_pretraining' / 'epoch_800.pth'
    path.parent.mkdir(parents=True)
    torch.save({'state_dict': weights}, path)
    follow('docs/checkpoints.md', folder, {})
    assert (folder / 'backbone.pth').exists()
    assert (folder / 'model.safetensors').exists()
