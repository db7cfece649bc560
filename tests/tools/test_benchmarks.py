"""The benchmarks run, and their figures are of what they say."""

import json
import math
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmcnv2.benchmarks.networks import build_ours
from mmcnv2.benchmarks.timing import check_agreement, peak_bytes

RunHere = Callable[..., None]
Output = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]
SMALL = ['--arch', 'atto', '--rounds', '2', '--device', 'cpu']
SLIM_UPERNET = ['decode_head.channels=16', 'auxiliary_head.channels=16']
SLIM_MASK_RCNN = [
    'neck.out_channels=16',
    'rpn_head.in_channels=16',
    'rpn_head.feat_channels=16',
    'roi_head.bbox_roi_extractor.out_channels=16',
    'roi_head.bbox_head.in_channels=16',
    'roi_head.bbox_head.fc_out_channels=16',
    'roi_head.mask_roi_extractor.out_channels=16',
    'roi_head.mask_head.in_channels=16',
    'roi_head.mask_head.conv_out_channels=16',
    'train_cfg.rcnn.sampler.num=16',
    'train_cfg.rpn_proposal.max_per_img=50',
    'test_cfg.rpn.max_per_img=20',
]


@pytest.fixture
def figures(
    run_here: RunHere, tmp_path: Path, capsys: Output
) -> Callable[..., dict[str, Any]]:
    """Run a benchmark, check what all have in common, and return its figures."""

    def run(name: str, *args: object) -> dict[str, Any]:
        file = tmp_path / 'figures.json'
        given = [*SMALL, *map(str, args), '--json', str(file)]
        run_here(f'benchmarks/{name}.py', *given)
        found = json.loads(file.read_text())
        check_common(found, capsys.readouterr().out)
        return found

    return run


def check_common(found: dict[str, Any], output: str) -> None:
    machine, rows = found['machine'], found['rows']
    assert {'cpu', 'flags', 'cores', 'threads', 'kernels'} <= set(machine)
    assert machine['own_kernels'] == 'compiled'
    assert {'python', 'torch', 'mmcnv2'} <= set(machine['versions'])
    assert found['arguments']['arch'] == 'atto'
    assert f'torch {machine["versions"]["torch"]}' in output
    # The head, the line below it, and the rows.
    first = re.split(r'\n\n', output[output.index('\n| ') :].strip())[0]
    assert first.count('\n') == len(rows) + 1
    for name, why in found['absent'].items():
        assert f'Absent: {name} ({why}).' in output
    for row in rows:
        if 'seconds' in row:
            assert 0 < row['fastest'] <= row['seconds'] <= row['slowest']
            assert row['seconds'] == pytest.approx(sum(row['turns']) / 2)
        if row.get('difference') and found['arguments']['dtype'] == 'float32':
            assert row['difference'] < 1e-4


def times(row: dict, other: dict) -> float:
    first, second = (a / b for a, b in zip(row['turns'], other['turns'], strict=True))
    return (first + second) / 2


def absent_of(**modules: str) -> set[str]:
    return {name for name, module in modules.items() if not find_spec(module)}


def test_encoder(figures: Callable) -> None:
    what = ['--size', 160, '--batch-size', 1, '--mask-ratios', 0.6, 0.8]
    found = figures('encoder', *what)
    names = ['packed', 'dense', 'dense-masked', 'dense-masked-plain']
    names += [] if find_spec('MinkowskiEngine') is None else ['minkowski']
    names += [] if find_spec('mmpretrain') is None else ['spark']
    absent = absent_of(minkowski='MinkowskiEngine', spark='mmpretrain')
    assert set(found['absent']) == absent
    rows = {(row['mask_ratio'], row['encoder']): row for row in found['rows']}
    assert list(rows) == [(ratio, name) for ratio in (0.6, 0.8) for name in names]
    for (ratio, name), row in rows.items():
        packed = rows[ratio, 'packed']
        assert row['times_packed'] == pytest.approx(times(row, packed))
        memory = row['peak_mib'] / packed['peak_mib']
        assert row['times_packed_memory'] == pytest.approx(memory)
        assert row['limit'] == pytest.approx({0.6: 25 / 10, 0.8: 25 / 5}[ratio])
        assert (row['difference'] is None) == (name == 'dense')
    # What a step holds at its peak shrinks with what it sees, and is no secret.
    dense, some, few = (
        rows[key]['peak_mib']
        for key in ((0.6, 'dense'), (0.6, 'packed'), (0.8, 'packed'))
    )
    assert 10 < dense < 100
    assert few < some < 0.7 * dense
    assert rows[0.8, 'dense']['seconds'] == rows[0.6, 'dense']['seconds']


def test_encoder_in_two_forms(figures: Callable) -> None:
    """Compiling takes minutes, and is tested where the layouts are."""
    what = ['--size', 96, '--batch-size', 2, '--forms', 'plain', 'compiled']
    with torch.compiler.set_stance('force_eager'):
        found = figures('encoder', *what, '--against', 'dense-masked')
    rows = {(row['encoder'], row['form']): row for row in found['rows']}
    names, forms = ('packed', 'dense-masked'), ('plain', 'compiled')
    assert list(rows) == [(name, form) for name in names for form in forms]
    for (_, form), row in rows.items():
        packed = rows['packed', form]
        assert row['times_packed'] == pytest.approx(times(row, packed))
        assert row['pictures'] == pytest.approx(2 / row['seconds'])


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--device', 'cpu'], 'graphed is a form on GPUs'),
        (['--device', 'cuda', '--against', 'spark'], 'cannot be graphed'),
    ],
)
def test_what_cannot_be_graphed(figures: Callable, more: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures('encoder', '--forms', 'graphed', *more)


def test_encoder_in_16_bits(figures: Callable) -> None:
    what = ['--size', 64, '--batch-size', 1, '--dtype', 'bfloat16']
    found = figures('encoder', *what, '--against', 'dense-masked-plain')
    assert 1e-5 < found['rows'][1]['difference'] < 5e-2


@pytest.mark.parametrize('apart', [2e-3, math.nan])
def test_contenders_that_disagree(apart: float) -> None:
    with pytest.raises(RuntimeError, match='timm computes something else'):
        check_agreement('timm', apart, 'float32')


def test_peak_is_what_a_step_holds() -> None:
    kept = torch.ones(2**18)

    def step() -> None:
        first = kept + 1
        second = first + 1
        del first
        kept.add_(second.exp())

    # Two at once, of a mebibyte each; what was there before does not count.
    assert peak_bytes(step, 'cpu') == pytest.approx(2 * 2**20, rel=1e-3)


def test_pretraining(figures: Callable) -> None:
    what = ['--size', 96, '--batch-size', 2, '--steps', 2, '--pictures', 4]
    found = figures('pretraining', *what, '--workers', 1)
    packed, dense = found['rows']
    assert [packed['encoder'], dense['encoder']] == ['packed', 'dense-masked']
    assert dense['times_packed'] == pytest.approx(packed['rate'] / dense['rate'])
    phases = ('waiting', 'forward', 'backward', 'optimizer')
    for row in (packed, dense):
        assert all(row[phase] > 0 for phase in phases)
        whole = sum(row[phase] for phase in phases)
        for phase in phases:
            assert row[f'{phase}_share'] == pytest.approx(row[phase] / whole)
        rates = [2 / sum(turn.values()) for turn in row['turns']]
        assert [row['slowest'], row['fastest']] == pytest.approx(sorted(rates))
        assert row['rate'] == pytest.approx(sum(rates) / 2)
    assert found['loading_alone'] > 0
    assert 'cv2' in found['machine']['versions']
    # 375 x 500 pixels of some detail.
    assert 30 < found['file_kib'] < 200


def test_backbone(figures: Callable) -> None:
    found = figures('backbone', '--size', 64, 96, '--batch-size', 1)
    libraries = ['transformers', 'timm', 'mmpretrain']
    present = [name for name in libraries if name not in found['absent']]
    assert absent_of(**{name: name for name in libraries}) <= set(found['absent'])
    assert 'transformers' in present
    apart = found['differences']['float32']
    assert list(apart) == ['ours', *present]
    # Not ours once more: others add in another order.
    assert all(0 < apart[name] < 1e-4 for name in present)
    for mode in ('training', 'inference'):
        rows = [row for row in found['rows'] if row['mode'] == mode]
        assert [row['backbone'] for row in rows[::2]] == ['ours', *present]
        ours = min(rows[:2], key=lambda row: row['seconds'])
        for plain, last in zip(rows[::2], rows[1::2], strict=True):
            assert [plain['form'], last['form']] == ['plain', 'channels_last']
            best = min(plain, last, key=lambda row: row['seconds'])
            assert best['counts'] == 'yes'
            for row in (plain, last):
                assert row['times_ours'] == pytest.approx(times(row, ours))


def test_backbone_in_the_form_compiled(figures: Callable) -> None:
    """It runs as it is here; compiling is tested where the backbone is."""
    what = ['--size', 64, '--batch-size', 1, '--forms', 'channels_last', 'compiled']
    with torch.compiler.set_stance('force_eager'):
        found = figures('backbone', *what, '--against')
    for mode in ('training', 'inference'):
        rows = [row for row in found['rows'] if row['mode'] == mode]
        assert [row['form'] for row in rows] == ['channels_last', 'compiled']
        assert sorted(row['counts'] for row in rows) == ['', 'yes']
        # What is compiled is the same model, and holds as much.
        assert rows[0]['peak_mib'] == pytest.approx(rows[1]['peak_mib'], rel=0.1)
        best = min(rows, key=lambda row: row['seconds'])
        for row in rows:
            assert row['times_ours'] == pytest.approx(times(row, best))


def test_backbone_in_several_dtypes(figures: Callable) -> None:
    what = ['--modes', 'inference', '--forms', 'plain', '--against']
    dtypes = ['float32', 'bfloat16']
    found = figures('backbone', '--size', 64, *what, '--dtype', *dtypes)
    rows = found['rows']
    assert [(row['backbone'], row['dtype']) for row in rows] == [
        ('ours', dtype) for dtype in dtypes
    ]
    assert [row['counts'] for row in rows] == ['yes', 'yes']
    assert rows[1]['times_ours'] == pytest.approx(times(rows[1], rows[0]))
    assert found['differences']['float32'] == {'ours': 0}
    assert 1e-4 < found['differences']['bfloat16']['ours'] < 5e-2


@pytest.mark.parametrize(
    ('model', 'slim', 'side'),
    [('mask-rcnn', SLIM_MASK_RCNN, 96), ('upernet', SLIM_UPERNET, 64)],
)
def test_heads(figures: Callable, model: str, slim: list[str], side: int) -> None:
    found = figures('heads', '--models', model, '--size', side, '--cfg-options', *slim)
    for mode in ('training', 'inference'):
        ours, *others = [row for row in found['rows'] if row['mode'] == mode]
        assert ours['backbone'] == 'ours'
        assert others[0]['backbone'] == 'transformers'
        for row in others:
            assert row['times_ours'] == pytest.approx(times(row, ours))
            assert 0 < row['difference'] < 1e-4
        assert found['rows'][0]['peak_mib'] > 1


def test_growth(figures: Callable, tmp_path: Path) -> None:
    base = ['--size', 96, '--batch-size', 1, '--sizes', 64, 96, 128]
    ranges = ['--mask-ratios', 0.4, 0.8, '--batch-sizes', 1, 2]
    by = ['--by', 'size', 'mask_ratio', 'batch_size']
    found = figures('growth', *base, *ranges, *by, '--plot', tmp_path / 'plot.svg')
    for row in found['rows']:
        cost = row['seconds'] / row['patches'] * 1e3
        assert row['ms_per_patch'] == pytest.approx(cost)
    # Of 2 x 2, 3 x 3 and 4 x 4 patches 40 % are seen, and of 9 60 % and 20 %.
    assert patches_of(found, 'packed') == [1, 3, 6, 5, 1, 3, 6]
    assert patches_of(found, 'dense') == [4, 9, 16, 9, 9, 9, 18]
    slopes = {(s['changes'], s['encoder']): s for s in found['slopes']}
    # Whole pictures cost the same, whatever the mask.
    assert ('mask_ratio', 'packed') in slopes
    assert ('mask_ratio', 'dense') not in slopes
    # Two points lie on a line, and three need not.
    assert slopes['batch_size', 'packed']['off_line'] < 1e-6
    assert slopes['size', 'dense']['off_line'] > 1e-6
    assert (tmp_path / 'plot.svg').stat().st_size > 10_000


def patches_of(found: dict[str, Any], encoder: str) -> list[int]:
    return [row['patches'] for row in found['rows'] if row['encoder'] == encoder]


def test_growth_of_processes(tmp_path: Path) -> None:
    tool = ROOT / 'tools' / 'benchmarks' / 'growth.py'
    what = ['--by', 'processes', '--size', '96', '--batch-size', '1']
    file = ['--json', tmp_path / 'figures.json']
    command = [sys.executable, tool, *SMALL, *what, *file, '--processes', '2']
    output = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE
    ).stdout
    found = json.loads((tmp_path / 'figures.json').read_text())
    check_common(found, output)
    assert [row['value'] for row in found['rows']] == [2, 2]
    assert patches_of(found, 'packed') == [6]
    assert patches_of(found, 'dense') == [18]


def test_slopes() -> None:
    slope = runpy.run_path(str(ROOT / 'tools' / 'benchmarks' / 'growth.py'))['slope']
    rows = [
        dict(changes='size', encoder='packed', patches=n, seconds=s, peak_mib=n**2)
        for n, s in ((1, 2.0), (2, 4.0), (4, 8.0))
    ]
    found = slope('size', 'packed', rows)
    assert found['exponent'] == pytest.approx(1)
    assert found['memory_exponent'] == pytest.approx(2)
    assert found['off_line'] == pytest.approx(0, abs=1e-9)
    assert found['fixed'] == pytest.approx(0, abs=1e-9)
    slower = [{**row, 'seconds': row['seconds'] + 0.5} for row in rows]
    assert slope('size', 'packed', slower)['fixed'] == pytest.approx(0.5)
    rows[1]['seconds'] = 5.0
    assert slope('size', 'packed', rows)['off_line'] > 0.1


def test_floor(figures: Callable) -> None:
    found = figures('floor', '--batch-size', 2, '--side', 128, '--mib', 4)
    square, *stages, copy = found['rows']
    assert square['rate'] == pytest.approx(2e-9 * 128**3 / square['fastest'])
    assert copy['rate'] == pytest.approx(8 * 2**20 / 1e9 / copy['fastest'])
    assert len(stages) == 4
    *parts, whole = found['floors']
    for key in ('pointwise', 'depthwise', 'other', 'floor', 'own_floor'):
        assert whole[key] == pytest.approx(sum(part[key] for part in parts))
    # Forward is a third; 19 patches of a picture are visible, of which PyTorch counts
    # the operations with those of one whole picture, 7 x 7 patches.
    counted = sum(whole[key] for key in ('pointwise', 'depthwise', 'other')) / 3
    model, picture = build_ours('atto', output_norm=False), torch.ones(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(picture)
    expected = counter.get_total_flops() * 2 * 19 / 49
    assert counted * 1e9 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ('name', 'given', 'message'),
    [
        ('heads', '--dtype bfloat16', 'give --models upernet'),
        ('heads', '--cfg-options decode_head.channels=16', 'name it in --models'),
        ('backbone', '--size 800 1000 1216', '--size takes height and width'),
        ('backbone', '--device mps', 'invalid choice'),
        ('growth', '--device cuda --processes 1 1000', '1000 processes need as many'),
    ],
)
def test_say_what_cannot_be(
    run_here: RunHere, capsys: Output, name: str, given: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        run_here(f'benchmarks/{name}.py', *given.split())
    assert message in capsys.readouterr().err
