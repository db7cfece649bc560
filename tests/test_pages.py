"""The commands of the pages besides the tutorials, one after the other, for real.

What stands on the page runs, but for this: configs are as small as those that the tests
of configs train, under the names of the real ones; options that follow say how often
things repeat; each machine is this one, with one process. A job of one process starts
without torchrun and Slurm, which have tests of their own in ``tools``.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .commands import free_port, run_tool, set_process
from .configs.conftest import ALL_RECIPES, ade, scenes, small  # noqa: F401
from .test_commands import calls_of, folder  # noqa: F401
from .test_docs import PAGES, ROOT, blocks, python_blocks
from .test_tutorials import name_checkpoints
from .tools.test_benchmarks import SLIM_MASK_RCNN

# What runs the commands of the others, or those of the same kind.
ELSEWHERE = {
    'CONTRIBUTING.md': '.ci/run',
    'docs/install.md': '.ci/run',
    'README.md': 'tests/test_tutorials.py',
    'docs/checkpoints.md': 'tests/test_tutorials.py',
    'docs/own_data.md': 'tests/test_tutorials.py',
    'docs/pretrain.md': 'tests/test_tutorials.py',
    'docs/mim.md': 'tests/tools/test_mim.py',
    'configs/classification/README.md': 'tests/configs/test_classification.py',
}
HERE = [page for page in PAGES if blocks(page, 'bash') and page not in ELSEWHERE]
# Run by .ci/run; and by tests of their own, with recipes of their own.
NOT_HERE = {'pip', 'pytest', 'tools/miniature.py', 'tools/kill_and_resume.py'}

# The last of options that repeat is the one that counts.
NETWORK = ['--arch', 'atto', '--rounds', '1', '--device', 'cpu', '--batch-size', '1']
SMALL = {
    'leaks.py': ['--interval', '1', '--cfg-options', 'train_cfg.max_epochs=10'],
    'floor.py': [*NETWORK, '--side', '64', '--mib', '1'],
    'encoder.py': [*NETWORK, '--size', '128'],
    'pretraining.py': [*NETWORK, '--size', '64', '--steps', '1', '--pictures', '2'],
    'backbone.py': [*NETWORK, '--size', '64', '64'],
    'heads.py': [*NETWORK, '--models', 'mask-rcnn', '--size', '64', '--cfg-options'],
    'growth.py': [*NETWORK, '--size', '64', '--sizes', '64', '96'],
}
SMALL['heads.py'] += SLIM_MASK_RCNN
SMALL['growth.py'] += ['--by', 'size', 'mask_ratio', '--mask-ratios', '0.5']
# What pages mean by placeholders, and what is changed.
IN_PLACE = {
    'CONFIG': 'configs/fcmae/fcmae_convnextv2-base_800e_imagenet.py',
    'CHECKPOINT': 'work_dirs/fcmae_convnextv2-base_800e_imagenet/epoch_1.pth',
    r'\[CHECKPOINT': 'work_dirs/fcmae_convnextv2-base_800e_imagenet/second.pth',
    r'\.{3}\]': 'work_dirs/fcmae_convnextv2-base_800e_imagenet/third.pth',
    'PICTURES': 'data/demo_scenes/images/val',
    r'(train_cfg\.(?:max_epochs|max_iters|val_interval))=\d+': r'\1=2',
    r'epoch_20\.pth': 'epoch_1.pth',
    r'--nproc_per_node=\d+': '--nproc_per_node=1',
    r'--master_addr=.*': '--master_addr=127.0.0.1',
    r'--launcher=slurm': '--launcher=pytorch',
    # On GPUs alone.
    'graphed': 'plain',
    # Which takes minutes for all contenders, and is tested where the backbone is.
    'compiled': 'plain',
    # Runs that differ in their seed alone become one.
    r'randomness\.seed=\d+': 'randomness.seed=0',
    r'(work_dirs/\w+)_\d': r'\1',
}


def test_every_page_is_followed() -> None:
    assert set(ELSEWHERE) < set(PAGES)
    assert all((ROOT / runner).exists() for runner in ELSEWHERE.values())


@pytest.fixture
def checkout(
    folder: Path,  # noqa: F811
    scenes: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Hold the demos' data, and no configs yet; set what launchers set."""
    Path('configs').unlink()
    Path('data').mkdir()
    Path('data', 'demo_scenes').symlink_to(scenes)
    set_process(monkeypatch, rank=0, processes=1, port=free_port())
    return folder


@pytest.mark.parametrize('page', HERE)
def test_page(page: str, checkout: Path, ade: Path) -> None:  # noqa: F811
    calls = [call for call in calls_of(page, checkout) if not NOT_HERE & {*call[:2]}]
    # DeepSpeed's config.
    calls = [adapted(call) for call in calls if 'my_config' not in ' '.join(call)]
    write_small_configs({arg for call in calls for arg in call}, ade)
    run_all(list(map(list, dict.fromkeys(map(tuple, calls)))))


def test_deepspeed(checkout: Path, ade: Path) -> None:  # noqa: F811
    pytest.importorskip('deepspeed', reason='DeepSpeed is absent: docs/many_gpus.md')
    page = 'docs/many_gpus.md'
    [config] = python_blocks(page)
    text = config.replace('mmcnv2::', './configs/')
    Path('my_config.py').write_text(text)
    write_small_configs(set(re.findall(r'configs/.*?\.py', text)), ade)
    calls = calls_of(page, checkout)
    train, merge = (call for call in calls if 'my_config' in ' '.join(call))
    run_all([adapted(train), adapted(merge)])
    [weights] = Path('whole').glob('pytorch_model*.bin')
    assert 'backbone.stages.0.0.grn.gamma' in torch.load(weights, weights_only=True)


def adapted(call: list[str]) -> list[str]:
    """Return what is to run here: a script, or several machines' launcher of one."""
    for pattern, here in IN_PLACE.items():
        call = [re.sub(f'^{pattern}$', here, arg) for arg in call]
    script = next(i for i, arg in enumerate(call) if arg.endswith('.py'))
    start = call.index('-m') if '--nnodes=2' in call else script
    # Settings come last, and there are as many as follow.
    end = call.index('--cfg-options') if '--cfg-options' in call else len(call)
    return [*call[start:end], *SMALL.get(Path(call[script]).name, []), *call[end:]]


def write_small_configs(named: set[str], ade: Path) -> None:  # noqa: F811
    """Write configs in place of those of this project that are named."""
    names = {f'configs/{recipe}': recipe for recipe in ALL_RECIPES}
    for path in named & set(names):
        cfg = small(names[path], Path.cwd(), Path('data/demo_scenes').resolve(), ade)
        # Runs are to go where they go by themselves.
        for where in ('work_dir', 'experiment_name'):
            cfg.pop(where)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # CPUs have no layers that know of other processes.
        Path(path).write_text(cfg.pretty_text.replace('SyncBN', 'BN'))


def run_all(commands: list[list[str]]) -> None:
    checkpoints = {arg for args in commands for arg in args if arg[:9] == 'work_dirs'}
    machines: list[subprocess.Popen] = []
    for args in commands:
        if args[0] == '-m':
            machines.append(launch(args, len(machines)))
        else:
            done = run_tool(args, Path.cwd())
            assert done.returncode == 0, f'{args}\n{done.stdout}'
        if len(machines) == 2:
            wait_for(machines)
        name_checkpoints(checkpoints)
    assert not machines


def launch(args: list[str], number: int) -> subprocess.Popen:
    """Start one machine's part of a distributed run."""
    port = f'--master_port={os.environ["MASTER_PORT"]}'
    args = [port if arg.startswith('--master_port') else arg for arg in args]
    return subprocess.Popen(
        [sys.executable, *args],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdout=Path(f'machine{number}.log').open('w'),
        stderr=subprocess.STDOUT,
    )


def wait_for(started: list[subprocess.Popen]) -> None:
    for i, process in enumerate(started):
        assert process.wait(timeout=300) == 0, Path(f'machine{i}.log').read_text()
    started.clear()
