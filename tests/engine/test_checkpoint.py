"""Saving, resuming and refusing real checkpoints through MMEngine's Runner."""

import functools
import http.server
import json
import os
import pickle
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_checkpoint
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmcnv2.engine.checkpoint import load_from_http


class Regression(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, inputs: Tensor, mode: str) -> dict[str, Tensor] | list[Tensor]:
        output = self.layer(inputs)
        return {'loss': output.square().mean()} if mode == 'loss' else [output]


class Points(Dataset):
    metainfo: ClassVar = {'classes': ('a', 'b'), 'palette': [(1, 2, 3), (4, 5, 6)]}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {'inputs': torch.tensor([1.0, float(index)])}


class Score(BaseMetric):
    """Reports numpy scalars, as the metrics of mmseg do."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(1)

    def compute_metrics(self, results: list) -> dict[str, Any]:
        return {'score': np.round(np.float64(0.123), 2), 'half': np.float32(0.5)}


def loader() -> dict[str, Any]:
    return {
        'dataset': Points(),
        'batch_size': 2,
        'num_workers': 0,
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        'collate_fn': {'type': 'default_collate'},
    }


def make_runner(work_dir: Path, max_epochs: int = 2, **kwargs: Any) -> Runner:
    best = {'save_best': ['score', 'half'], 'rule': 'greater'}
    return Runner(
        Regression(),
        str(work_dir),
        train_dataloader=loader(),
        train_cfg={'by_epoch': True, 'max_epochs': max_epochs},
        optim_wrapper={'optimizer': {'type': 'AdamW', 'lr': 0.1}},
        param_scheduler=[
            {'type': 'LinearLR', 'start_factor': 0.1, 'end': 2, 'by_epoch': False},
            {'type': 'MultiStepLR', 'milestones': [1]},
            {'type': 'CosineAnnealingLR', 'T_max': 4},
            {'type': 'PolyLR', 'end': 4},
            {'type': 'OneCycleLR', 'eta_max': 0.1, 'total_steps': 4},
        ],
        val_dataloader=loader(),
        val_evaluator=[Score()],
        val_cfg={},
        default_hooks={'checkpoint': {'type': 'CheckpointHook', 'interval': 1, **best}},
        custom_hooks=[{'type': 'EMAHook'}],
        # MMEngine keeps a logger for each name.
        experiment_name=uuid4().hex,
        **kwargs,
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work dir with checkpoints of every kind that the hooks write."""
    work_dir = tmp_path_factory.mktemp('trained') / 'run'
    make_runner(work_dir).train()
    return work_dir


def test_resume_goes_on_where_training_stopped(trained: Path, tmp_path: Path) -> None:
    runner = make_runner(tmp_path / 'run', max_epochs=3, resume=True)
    runner.load_or_resume()
    assert runner.epoch == 0, 'there is nothing to resume from yet'

    runner = make_runner(
        tmp_path / 'more', 3, resume=True, load_from=str(trained / 'epoch_2.pth')
    )
    runner.train()
    assert (runner.epoch, runner.iter) == (3, 6)
    losses, counts = runner.message_hub.get_scalar('train/loss').data
    assert len(losses) == len(counts) == 6
    assert runner.message_hub.get_info('best_score_score') == pytest.approx(0.12)


def test_every_checkpoint_that_the_hooks_write_loads(trained: Path) -> None:
    paths = sorted(trained.glob('*.pth'))
    assert len(paths) == 4, 'two epochs and two best ones'
    for path in paths:
        checkpoint = load_checkpoint(Regression(), str(path))
        history = checkpoint['message_hub']['log_scalars']['train/loss']
        assert isinstance(history, HistoryBuffer)
        assert history.mean() > 0


def test_checkpoint_of_numpy_1_loads(trained: Path, tmp_path: Path) -> None:
    old, new = b'numpy.core.multiarray', b'numpy._core.multiarray'
    if new not in pickle.dumps(np.zeros(1), protocol=2):
        old, new = new, old
    # The pickle alone, so that lengths of the archive's records stay right.
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=True)
    path = tmp_path / 'old.pth'
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    assert new in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(new, old))
    loaded = load_checkpoint(Regression(), str(path))
    expected = checkpoint['message_hub']['log_scalars']['train/loss'].data
    actual = loaded['message_hub']['log_scalars']['train/loss'].data
    np.testing.assert_array_equal(actual, expected)


class Call:
    """Pickles as a call, the way an attack does."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


ATTACKS = {
    'os.system': (lambda mark: Call(os.system, f'touch {mark}'), 'posix.system'),
    'eval': (lambda mark: Call(eval, f'open({str(mark)!r}, "w")'), 'eval'),
    'open': (lambda mark: Call(open, str(mark), 'w'), 'open'),
    'functools.partial': (
        lambda mark: Call(functools.partial(os.system, f'touch {mark}')),
        'functools.partial',
    ),
    'getattr of an allowed method': (
        lambda mark: Call(getattr, Call(getattr, HistoryBuffer, 'min'), '__globals__'),
        'builtins.getattr',
    ),
    'getattr of an allowed class': (
        lambda mark: Call(getattr, HistoryBuffer, '__init__'),
        'builtins.getattr',
    ),
    'object array': (
        lambda mark: np.array([Call(os.system, f'touch {mark}')], dtype=object),
        'numpy.dtypes.ObjectDType',
    ),
    'log buffer': (
        lambda mark: with_statistics(Call(eval, f'open({str(mark)!r}, "w")')),
        'eval',
    ),
}


def with_statistics(method: Any) -> HistoryBuffer:
    history = HistoryBuffer([1.0], [1])
    history._statistics_methods = {'mean': method}
    return history


def write(attack: Any, path: Path, zipped: bool) -> None:
    content = {'state_dict': OrderedDict(weight=torch.ones(1)), 'meta': attack}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('name', ATTACKS)
def test_anything_else_is_refused_and_never_runs(
    name: str, zipped: bool, tmp_path: Path
) -> None:
    mark = tmp_path / 'mark'
    path = tmp_path / 'attack.pth'
    make, refused = ATTACKS[name]
    write(make(mark), path, zipped)

    model = Regression()
    before = model.layer.weight.clone()
    message = f'Refused to load {re.escape(str(path))}: it holds .*{refused}'
    with pytest.raises(RuntimeError, match=message):
        load_checkpoint(model, str(path))
    assert not mark.exists()
    torch.testing.assert_close(model.layer.weight, before, rtol=0, atol=0)


@pytest.mark.parametrize('name', ['os.system', 'open'])
def test_attacks_are_real(name: str, tmp_path: Path) -> None:
    """Without safe loading they would leave a mark, so the test above can fail."""
    mark = tmp_path / 'mark'
    make, _ = ATTACKS[name]
    write(make(mark), tmp_path / 'attack.pth', zipped=True)
    torch.load(tmp_path / 'attack.pth', weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize('share', [0.0, 0.01, 0.5, 0.99])
def test_truncated_file_leaves_the_model_as_it_was(
    trained: Path, tmp_path: Path, share: float
) -> None:
    whole = (trained / 'epoch_2.pth').read_bytes()
    path = tmp_path / 'epoch_2.pth'
    path.write_bytes(whole[: int(share * len(whole))])
    runner = make_runner(tmp_path / 'run', 3, resume=True, load_from=str(path))
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}

    message = f'Cannot read {re.escape(str(path))} .{path.stat().st_size} bytes'
    with pytest.raises(RuntimeError, match=message) as error:
        runner.train()
    assert 'truncated' in str(error.value)
    assert error.value.__cause__ is None
    for key, value in runner.model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert runner.iter == 0


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / 'picture.pth'
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(100))
    with pytest.raises(RuntimeError, match=r'picture.pth \(108 bytes\)'):
        load_checkpoint(Regression(), str(path))


@pytest.mark.skipif(torch.cuda.is_available(), reason='the device is there')
def test_file_of_a_device_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / 'cuda.pth'
    weights = {'layer.bias': torch.ones(1)}
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    # The name of the device, behind its length.
    before, after = (bytes([len(name), 0, 0, 0]) + name for name in (b'cpu', b'cuda:0'))
    assert before in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(before, after))
    with pytest.raises(RuntimeError, match=r'^Attempting to deserialize .* CUDA'):
        load_checkpoint(Regression(), str(path), map_location=None)
    model = Regression()
    load_checkpoint(model, str(path), map_location='cpu')
    assert model.layer.bias == 1


@pytest.mark.parametrize(
    'error',
    [
        PermissionError(13, 'Permission denied'),
        MemoryError('no more'),
        torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB'),
    ],
    ids=repr,
)
def test_errors_that_are_not_the_files(
    error: Exception, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need another machine, or another user, so here torch is told to fail."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(torch, 'load', fail)
    with pytest.raises(type(error)) as raised:
        load_checkpoint(Regression(), str(trained / 'epoch_1.pth'))
    assert raised.value is error


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f'no checkpoint file {tmp_path}'):
        load_checkpoint(Regression(), str(tmp_path / 'absent.pth'))


@pytest.fixture
def server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Path]]:
    """Serve a folder on this machine; downloads go to a cache of their own."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'cache'))
    folder = tmp_path / 'served'
    folder.mkdir()
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(folder)
    )
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}', folder
        server.shutdown()


def test_downloads_are_loaded_safely_too(
    server: tuple[str, Path], trained: Path, tmp_path: Path
) -> None:
    url, folder = server
    (folder / 'good.pth').write_bytes((trained / 'epoch_2.pth').read_bytes())
    checkpoint = load_checkpoint(Regression(), f'{url}/good.pth')
    assert checkpoint['meta']['epoch'] == 2

    mark = tmp_path / 'mark'
    write(Call(os.system, f'touch {mark}'), folder / 'bad.pth', zipped=True)
    with pytest.raises(RuntimeError, match=r'Refused to load .*bad-\w+\.pth'):
        load_checkpoint(Regression(), f'{url}/bad.pth')
    assert not mark.exists()


def test_files_of_one_name_and_several_urls(
    server: tuple[str, Path], tmp_path: Path
) -> None:
    """As all of Hugging Face's are called."""
    url, folder = server
    for value, name in enumerate(('a', 'b')):
        (folder / name).mkdir()
        torch.save({'x': torch.tensor(value)}, folder / name / 'model.pth')
        torch.save({'x': torch.tensor(value)}, folder / f'{name}-0123abcd.pth')
    for value, name in enumerate(('a', 'b')):
        for path in (f'{name}/model.pth', f'{name}-0123abcd.pth'):
            assert load_from_http(f'{url}/{path}')['x'] == value
    # Those with a hash are where others have put them, or look for them.
    cached = {path.name for path in (tmp_path / 'cache' / 'checkpoints').iterdir()}
    assert {'a-0123abcd.pth', 'b-0123abcd.pth'} < cached
    assert len(cached) == 4


def test_named_checkpoints_are_loaded_safely_too(
    server: tuple[str, Path],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, folder = server
    (folder / 'named.pth').write_bytes((trained / 'epoch_2.pth').read_bytes())
    mark = tmp_path / 'mark'
    write(Call(os.system, f'touch {mark}'), folder / 'worse.pth', zipped=True)
    # MMEngine takes a user's own names from here.
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    (tmp_path / 'own.pth').write_bytes((trained / 'epoch_2.pth').read_bytes())
    names = {'good': f'{url}/named.pth', 'bad': f'{url}/worse.pth', 'own': 'own.pth'}
    (tmp_path / 'open_mmlab.json').write_text(json.dumps(names))
    for name in ('open-mmlab://good', 'openmmlab://own'):
        checkpoint = load_checkpoint(Regression(), name)
        assert checkpoint['meta']['epoch'] == 2
    with pytest.raises(RuntimeError, match=r'Refused to load .*worse-\w+\.pth'):
        load_checkpoint(Regression(), 'openmmlab://bad')
    assert not mark.exists()
    with pytest.raises(KeyError, match="open-mmlab has no checkpoint 'none'"):
        load_checkpoint(Regression(), 'open-mmlab://none')
