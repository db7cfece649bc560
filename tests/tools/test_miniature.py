"""The paper in miniature, run whole on tiny data; what it starts, by quick programs."""

import csv
import json
import runpy
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope

from mmcnv2.engine.conversion import save_weights
from mmcnv2.models import ConvNeXtV2
from mmcnv2.registry import MODELS

from .conftest import ROOT, Run

DEMO = ROOT / 'configs' / 'demo' / 'miniature'

PRETRAINING = """
_base_ = '{folder}/fcmae.py'
custom_hooks = []
"""
FINETUNING = """
_base_ = '{folder}/{name}.py'
val_dataloader = {{{{_base_.test_dataloader}}}}
val_evaluator = {{{{_base_.test_evaluator}}}}
val_cfg = dict()
train_cfg = dict(val_interval=1)
"""
ARGS = ['--configs', 'miniature', '--tasks', 'segmentation', '--table-2f']
COMPARED = ['V1-random', 'V1-pretrained', 'V2-random', 'V2-pretrained']
BLOCKS = [('no', 'V1'), ('V1', 'V1'), ('no', 'V2'), ('V2', 'V2')]


@pytest.fixture
def tool() -> dict:
    return runpy.run_path(str(ROOT / 'tools' / 'miniature.py'))


@pytest.fixture
def recipes(tools_folder: Path) -> Path:
    folder = tools_folder / 'miniature'
    folder.mkdir(exist_ok=True)
    (folder / 'pretraining.py').write_text(PRETRAINING.format(folder=tools_folder))
    for name in ('segmentation', 'detection'):
        text = FINETUNING.format(folder=tools_folder, name=name[:3])
        (folder / f'{name}.py').write_text(text)
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_runs_whole_and_goes_on(
    run: Run, run_here, recipes: Path, tmp_path: Path
) -> None:
    args = [*ARGS, '--seeds', '3', '--out-dir', str(tmp_path)]
    printed = run('miniature.py', *args).stdout
    rows = read_csv(tmp_path / 'results.csv')
    places = [(row['pretrained'], row['finetuned']) for row in rows]
    assert places == BLOCKS
    for name, row in zip(COMPARED, rows, strict=True):
        folder = tmp_path / 'segmentation' / name / 'seed3'
        (scalars,) = folder.glob('*/vis_data/scalars.json')
        last = json.loads(scalars.read_text().splitlines()[-1])
        assert float(row['value']) == last['mIoU'] > 0
    table = (tmp_path / 'results.md').read_text()
    assert table in printed
    first = float(rows[0]['value'])
    assert f'| no | V1 | {first:.1f} ({first:.1f}) |' in table

    for name in COMPARED:
        log = (tmp_path / 'segmentation' / name / 'seed3' / 'log.txt').read_text()
        start = f"Backbone from {tmp_path}/backbones/{name}.pth (in the format 'ours')"
        assert (start in log) == ('pretrained' in name)
    measured = read_csv(tmp_path / 'diversity' / 'diversity.csv')
    assert [row['checkpoint'] for row in measured[::4]] == COMPARED
    assert len(measured) == 16
    for block in ('V1', 'V2'):
        pictures = (tmp_path / 'reconstructions' / block).glob('*.png')
        assert [path.name for path in sorted(pictures)] == [f'{i}.png' for i in '0123']

    # One run did not end. It is the only one to be repeated, and ends as before.
    (tmp_path / 'segmentation' / 'V1-pretrained' / 'seed3' / 'ended').unlink()
    before = {path: path.stat().st_mtime for path in tmp_path.rglob('log.txt')}
    assert len(before) == 9
    run_here('miniature.py', *args)
    again = [path for path, then in before.items() if path.stat().st_mtime != then]
    assert [path.parts[-3] for path in again] == ['V1-pretrained']
    assert read_csv(tmp_path / 'results.csv') == rows

    with (recipes / 'detection.py').open('a') as file:
        file.write('randomness = dict(seed=1)\n')
    with pytest.raises(SystemExit, match='holds runs of other recipes than those in'):
        run_here('miniature.py', *args)


@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_table_2f(tool: dict, tmp_path: Path, task: str) -> None:
    """GRN is taken out of V2, or put into V1, and not before fine-tuning."""
    args = Namespace(
        out_dir=tmp_path, configs=DEMO, tasks=[], table_2f=[task], seeds=[1]
    )
    weights = {}
    for block in ('V1', 'V2'):
        model = ConvNeXtV2('atto', use_grn=block == 'V2')
        weights[block] = model.stages[3][1].pwconv1.weight
        path = tool['backbone'](args, tool['Variant'](block, block))
        save_weights({f'backbone.{k}': v for k, v in model.state_dict().items()}, path)
    found = {}
    for run, (_, variant, seed) in tool['finetunings'](args).items():
        cfg = Config.fromfile(run.command[1])
        options = run.command[run.command.index('--cfg-options') + 1 :]
        cfg.merge_from_dict(parsed(options))
        init_default_scope(cfg.default_scope)
        backbone = MODELS.build(cfg.model.backbone)
        backbone.init_weights()
        assert cfg.randomness.seed == seed == 1
        assert torch.equal(
            backbone.stages[3][1].pwconv1.weight, weights[variant.pretrained]
        )
        found[variant.pretrained] = backbone.use_grn
    assert found == {'V1': True, 'V2': False}


def parsed(options: tuple[str, ...]) -> dict:
    parser = ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args(['--cfg-options', *options]).cfg_options


def script(path: Path, text: str) -> tuple[str]:
    path.write_text(text)
    return (str(path),)


def test_several_at_a_time(tool: dict, tmp_path: Path) -> None:
    nap = 'import time; begin = time.time(); time.sleep(0.5); print(begin, time.time())'
    command = script(tmp_path / 'nap.py', nap)
    runs = [tool['Run'](tmp_path / str(i), command) for i in range(3)]
    ended = []
    tool['run_all'](runs, 2, then=lambda: ended.append(time.time()))
    times = [list(map(float, run.log.read_text().split())) for run in runs]
    assert len(ended) == 3
    assert times[1][0] < times[0][1]
    assert times[2][0] > min(times[0][1], times[1][1])
    tool['run_all'](runs, 2, then=lambda: ended.append(time.time()))
    assert len(ended) == 3


def test_a_failure_stops_the_others_and_is_told(tool: dict, tmp_path: Path) -> None:
    # As training does, with a worker.
    nap = 'import subprocess; job = subprocess.Popen(["sleep", "600"]); '
    nap += 'print(job.pid, flush=True); job.wait()'
    forever = tool['Run'](tmp_path / 'a', script(tmp_path / 'nap.py', nap))
    fail = 'import time; time.sleep(2); raise SystemExit("no picture")'
    fails = tool['Run'](tmp_path / 'b', script(tmp_path / 'fail.py', fail))
    begin = time.monotonic()
    with pytest.raises(SystemExit, match=r'b failed with status 1:\nno picture\n.*log'):
        tool['run_all']([forever, fails], 2)
    assert time.monotonic() - begin < 60
    assert not forever.end.exists()
    assert not fails.end.exists()
    worker = Path('/proc', forever.log.read_text().strip(), 'stat')
    deadline = time.monotonic() + 10
    while worker.exists() and worker.read_text().split()[2] != 'Z':
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_table(tool: dict) -> None:
    variants = tool['COMPARED'] + tool['TABLE_2F']
    values = {
        variant: [i + 0.5, i + 1.0, i + 3.0] for i, variant in enumerate(variants)
    }
    rows = [
        (v, 'mIoU', seed, x) for v, xs in values.items() for seed, x in enumerate(xs)
    ]
    table = tool['table'](rows).splitlines()
    assert table[0] == '| pre-trained | fine-tuned | mIoU |'
    cells = [line.strip('| ').split(' | ') for line in table[2:]]
    assert [tuple(each[:2]) for each in cells] == [
        *BLOCKS,
        ('V2', 'V1, GRN removed'),
        ('V1', 'V2, GRN added'),
    ]
    for found, each in zip(cells, values.values(), strict=True):
        listed = ', '.join(f'{value:.1f}' for value in each)
        assert found[2] == f'{mean(each):.1f} ± {stdev(each):.1f} ({listed})'
