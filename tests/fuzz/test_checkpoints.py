"""Checkpoints that are broken, foreign or hostile: refused by name, and never run."""

import builtins
import importlib
import itertools
import os
import pickle
import random
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from mmcnv2.engine import PretrainedBackbone
from mmcnv2.engine.conversion import save_weights
from mmcnv2.models import ConvNeXtV2

from ..tools.conftest import ROOT
from .conftest import FACTOR, clear_error, damaged

ARCH = dict(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))


def backbone() -> ConvNeXtV2:
    return ConvNeXtV2(ARCH)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        f'backbone.{name}': torch.randn_like(value)
        for name, value in backbone().state_dict().items()
    }


def write(path: Path, weights: dict[str, Tensor], kind: str) -> bytes:
    if kind == 'safetensors':
        path = path.with_suffix('.safetensors')
        save_weights(weights, path)
    else:
        zipped = kind == 'zip'
        training = {
            'meta': {'epoch': 1},
            'message_hub': {'loss': HistoryBuffer([1.0], [1])},
        }
        content = {'state_dict': weights, **training}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


def convert(source: Path, target: Path) -> None:
    """Run the tool, in this process."""
    arguments = [str(source), str(target), '--to', 'timm']
    sys.argv = ['convert_checkpoint.py', *arguments]
    runpy.run_path(str(ROOT / 'tools' / sys.argv[0]), run_name='__main__')


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], None]:
    monkeypatch.setattr(sys, 'argv', [])

    def run(source: Path) -> None:
        target = tmp_path / 'converted.pth'
        convert(source, target)
        target.unlink()

    return run


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
def test_damaged_files(tmp_path, weights, generator, kind, tool):
    whole = write(tmp_path / 'whole.pth', weights, kind)
    suffix = '.safetensors' if kind == 'safetensors' else '.pth'
    path = tmp_path / f'damaged{suffix}'

    def load(path: Path) -> None:
        loaded = CheckpointLoader.load_checkpoint(str(path), 'cpu', 'silent')
        # The other formats have no checksums, and any bits are a number.
        if kind == 'zip':
            assert loaded['meta'] == {'epoch': 1}
            torch.testing.assert_close(loaded['state_dict'], weights, rtol=0, atol=0)

    readers: list[Callable[[Path], Any]] = [
        load,
        lambda path: PretrainedBackbone(str(path))(backbone()),
        tool,
    ]
    errors = 0
    for i in range(250 * FACTOR):
        path.write_bytes(damaged(whole, generator))
        with clear_error(path) as raised:
            readers[i % 3](path)
        errors += len(raised)
    assert errors > 0.2 * 250 * FACTOR
    assert not list(tmp_path.glob('.*unfinished'))


def spoilt(weights: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    """Change a tensor's shape, name or kind, or leave it out."""
    weights = dict(weights)
    name = str(generator.choice(list(weights)))
    value = weights.pop(name)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: weights.update({name: value[..., :-1]}),
        lambda: weights.update({name: value[None]}),
        lambda: weights.update({name: torch.cat([value, value])}),
        lambda: weights.update({name: torch.zeros(0)}),
        lambda: weights.update({name: value.tolist()}),
        lambda: weights.update({name: None}),
        lambda: weights.update({f'{name}.more': value, name: value}),
        lambda: weights.update({name.replace('stages', 'layers'): value}),
        lambda: weights.update({1: value, name: value}),
        lambda: weights.update({name: value.int()}),
        lambda: weights.update({name: value.to_sparse()}),
        lambda: weights.update({name: value.cfloat()}),
    ]
    changes[generator.integers(len(changes))]()
    return weights


def test_weights_of_another_shape_name_or_kind(tmp_path, weights, generator, tool):
    path = tmp_path / 'spoilt.pth'
    errors = 0
    for i in range(200 * FACTOR):
        changed = spoilt(weights, generator)
        torch.save({'state_dict': changed}, path)
        model = backbone()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with clear_error(path) as raised:
            if i % 2:
                PretrainedBackbone(str(path))(model)
            else:
                tool(path)
        errors += len(raised)
        if raised or i % 2 == 0:
            continue
        for name, value in model.state_dict().items():
            expected = changed.get(f'backbone.{name}', before[name])
            torch.testing.assert_close(value, expected.reshape_as(value).to(value))
    assert errors > 0.3 * 200 * FACTOR


class Call:
    """Pickles as a call, the way an attack does."""

    def __init__(self, function: Callable, *args: Any, state: Any = None) -> None:
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple:
        return self.call


# What runs code or touches files when it is called, or hands on what does.
FUNCTIONS: list[Callable[[str], Call]] = [
    lambda mark: Call(os.system, f'touch {mark}'),
    lambda mark: Call(os.popen, f'touch {mark}'),
    lambda mark: Call(os.mkdir, mark),
    lambda mark: Call(subprocess.call, ['touch', mark]),
    lambda mark: Call(subprocess.Popen, ['touch', mark]),
    lambda mark: Call(builtins.exec, f'open({mark!r}, "w")'),
    lambda mark: Call(builtins.eval, f'open({mark!r}, "w")'),
    lambda mark: Call(builtins.open, mark, 'w'),
    lambda mark: Call(builtins.map, os.mkdir, [mark]),
    lambda mark: Call(importlib.import_module, 'antigravity'),
    lambda mark: Call(runpy.run_path, mark),
    lambda mark: Call(Path.touch, Path(mark)),
    lambda mark: Call(np.save, mark, 1),
    lambda mark: Call(torch.save, 1, mark),
    lambda mark: Call(torch.hub.download_url_to_file, f'file://{__file__}', mark),
    lambda mark: Call(pickle.loads, pickle.dumps(Call(os.mkdir, mark))),
    lambda mark: Call(random.Random, Call(os.mkdir, mark)),
    lambda mark: Call(getattr, Call(getattr, HistoryBuffer, 'mean'), '__globals__'),
    lambda mark: Call(re.compile, Call(os.mkdir, mark)),
]

# Where an attack may hide.
PLACES: list[Callable[[Any], Any]] = [
    lambda attack: attack,
    lambda attack: [attack],
    lambda attack: {'state_dict': attack},
    lambda attack: {'state_dict': OrderedDict(weight=attack)},
    lambda attack: {'state_dict': {}, 'meta': {'cfg': attack}},
    lambda attack: {'state_dict': {}, 'optimizer': {'state': {0: (attack,)}}},
    lambda attack: {'state_dict': {}, 'message_hub': np.array([attack], object)},
    lambda attack: {'model': {}, 'args': Namespace(lr=attack)},
    lambda attack: {attack: 1},
    lambda attack: Call(OrderedDict, state={'x': attack}),
    lambda attack: Call(HistoryBuffer, state={'_statistics_methods': attack}),
    lambda attack: Call(Namespace, state={'x': attack}),
    lambda attack: Call(torch._utils._rebuild_parameter, attack, True, OrderedDict()),
    lambda attack: Call(np.dtype, attack),
]


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'pickle'])
def test_attacks_never_run(tmp_path, monkeypatch, generator, kind, tool):
    monkeypatch.chdir(tmp_path)
    path, mark = tmp_path / 'attack.pth', tmp_path / 'mark'
    readers: list[Callable[[Path], Any]] = [
        lambda path: CheckpointLoader.load_checkpoint(str(path), 'cpu', 'silent'),
        lambda path: PretrainedBackbone(str(path))(backbone()),
        tool,
    ]
    cases = list(itertools.product(FUNCTIONS, PLACES))
    for i, (function, place) in enumerate(cases):
        attack = place(function(str(mark)))
        protocol = int(generator.integers(2, 6)) if kind == 'pickle' else 2
        if kind == 'pickle':
            path.write_bytes(pickle.dumps(attack, protocol))
        else:
            torch.save(attack, path, _use_new_zipfile_serialization=kind == 'zip')
        with clear_error(path) as raised:
            readers[i % 3](path)
        assert raised
        assert not mark.exists(), raised
        assert 'antigravity' not in sys.modules
    assert sorted(each.name for each in tmp_path.iterdir()) == ['attack.pth']


def test_attacks_are_real(tmp_path):
    """Most would leave a mark, so that the test above can fail."""
    left = 0
    for i, function in enumerate(FUNCTIONS):
        mark = tmp_path / f'{i}'
        with suppress(Exception):
            pickle.loads(pickle.dumps(function(str(mark))))
        left += mark.exists() or Path(f'{mark}.npy').exists()
    assert left >= 12
