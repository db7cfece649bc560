"""``tools/train.py`` and ``dist_train.sh`` from the command line."""

import functools
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.device import get_device

import mmcnv2  # noqa: F401

from .conftest import ROOT

Run = Callable[..., CompletedProcess]
RunHere = Callable[..., None]

needs_cpu = pytest.mark.skipif(
    get_device() != 'cpu', reason='there is an accelerator, for which --amp works'
)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def losses(checkpoint: dict) -> np.ndarray:
    return checkpoint['message_hub']['log_scalars']['train/loss'].data[0]


def test_both_tasks_train(trained: dict[str, Path]) -> None:
    detector, segmentor = load(trained['det']), load(trained['seg'])
    assert detector['meta']['epoch'] == 1
    assert segmentor['meta']['iter'] == 4
    assert np.isfinite(losses(detector)).all()
    assert 'backbone.stages.0.0.grn.gamma' in detector['state_dict']
    assert 'backbone.stages.0.0.grn.gamma' in segmentor['state_dict']


def test_auto_scale_lr(trained: dict[str, Path]) -> None:
    [group] = load(trained['det'])['optimizer']['param_groups']
    assert group['lr'] == pytest.approx(1e-3 / 4), 'batches of 1, the rate is for 4'


def test_resume_the_latest(run: Run, trained: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(trained['seg'].parent, tmp_path / 'run')
    # The file names the checkpoint by its path, as MMEngine writes it.
    latest = tmp_path / 'run' / 'iter_4.pth'
    (tmp_path / 'run' / 'last_checkpoint').write_text(str(latest))
    longer = ['--cfg-options', 'train_cfg.max_iters=6']
    output = run(
        'train.py', 'seg.py', '--work-dir', tmp_path / 'run', '--resume', *longer
    ).stdout
    assert 'Iter(train) [5/6]' in output
    assert 'Iter(train) [4/6]' not in output
    before, after = load(latest), load(tmp_path / 'run' / 'iter_6.pth')
    assert len(losses(after)) == 6
    np.testing.assert_array_equal(losses(after)[:4], losses(before))


def test_resumed_run_ends_as_one_that_was_not_interrupted(
    run: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    halfway = trained['seg'].with_name('iter_2.pth')
    run('train.py', 'seg.py', '--work-dir', tmp_path, '--resume', halfway)
    resumed, whole = load(tmp_path / 'iter_4.pth'), load(trained['seg'])
    torch.testing.assert_close(resumed['state_dict'], whole['state_dict'])
    np.testing.assert_allclose(losses(resumed), losses(whole), rtol=1e-5)


def test_two_processes_train_as_one_does_on_the_joint_batch(
    run: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    single = ['--cfg-options', 'train_dataloader.batch_size=1']
    run('train.py', 'seg.py', '--work-dir', tmp_path, *single, processes=2)
    # Steps of plain SGD agree only where the gradients do.
    for name in ('iter_2.pth', 'iter_4.pth'):
        joint, split = load(trained['seg'].with_name(name)), load(tmp_path / name)
        for key, weight in split['state_dict'].items():
            expected = joint['state_dict'][key]
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def test_two_processes_pretrain_on_masks_and_pictures_of_their_own(
    run: Run, tmp_path: Path
) -> None:
    enabled = ['--cfg-options', 'auto_scale_lr.enable=True']
    run('train.py', 'fcmae.py', '--work-dir', tmp_path, *enabled, processes=2)
    first, second = (load(tmp_path / f'process_{rank}.pt') for rank in range(2))
    assert len({*first['pictures'], *second['pictures']}) == 4
    for mask, other in zip(first['masks'], second['masks'], strict=True):
        assert mask.sum() == other.sum() == 4
    assert not torch.equal(torch.cat(first['masks']), torch.cat(second['masks']))
    for moment in ('start', 'end'):
        torch.testing.assert_close(first[moment], second[moment], rtol=0, atol=0)
    assert not torch.equal(
        first['start']['backbone.stages.0.0.dwconv.weight'],
        first['end']['backbone.stages.0.0.dwconv.weight'],
    )
    # Two batches of one in each of two processes, and the rate is for 8.
    [group] = load(tmp_path / 'epoch_1.pth')['optimizer']['param_groups']
    assert group['lr'] == pytest.approx(1e-3 / 2)
    # The config that is stored says so too, and not what MMEngine makes of it.
    stored = Config.fromfile(tmp_path / 'fcmae.py', import_custom_modules=False)
    assert stored.auto_scale_lr == dict(base_batch_size=8, enable=True)


def test_sharded_training_is_distributed_training(run: Run, tmp_path: Path) -> None:
    wrapper = 'optim_wrapper.accumulative_counts=1 optim_wrapper.optimizer.type=AdamW '
    wrapper += 'optim_wrapper.optimizer.weight_decay=0.5 '
    wrapper += 'optim_wrapper.constructor=LayerDecayOptimWrapperConstructor '
    wrapper += 'optim_wrapper.paramwise_cfg.decay_rate=0.9 custom_hooks=[]'
    sharded = ['runner_type=FlexibleRunner', 'strategy.type=mmcnv2.FSDPStrategy']
    train = functools.partial(run, 'train.py', 'fcmae.py', '--cfg-options', processes=2)
    train(*wrapper.split(), '--work-dir', tmp_path / 'whole')
    train(*wrapper.split(), *sharded, '--work-dir', tmp_path / 'sharded')
    whole, shards = (load(tmp_path / n / 'epoch_1.pth') for n in ('whole', 'sharded'))
    torch.testing.assert_close(shards['state_dict'], whole['state_dict'])
    groups = [each['optimizer']['param_groups'] for each in (shards, whole)]
    for group, expected in zip(*groups, strict=True):
        assert len(group['params']) == len(expected['params'])
        for key in ('lr', 'weight_decay', 'name'):
            assert group[key] == expected[key]

    more = ['train_cfg.max_epochs=2', '--resume']
    train(*wrapper.split(), *sharded, *more, '--work-dir', tmp_path / 'sharded')
    resumed = load(tmp_path / 'sharded' / 'epoch_2.pth')
    assert {
        state['step'].item() for state in resumed['optimizer']['state'].values()
    } == {4}


def test_two_processes_train_the_demo(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('PORT', '29537')
    options = [f'train_dataloader.dataset.data_root={tmp_path}/scenes']
    options += [f'val_dataloader.dataset.data_root={tmp_path}/scenes']
    for split, count in (('train', 4), ('val', 1), ('unlabelled', 0)):
        for loader in ('train', 'val'):
            options += [f'{loader}_dataloader.dataset.counts.{split}={count}']
    options += ['train_dataloader.batch_size=2', 'train_cfg.max_iters=2']
    demo = ROOT / 'configs' / 'demo' / 'upernet_convnextv2-atto_demo.py'
    arguments = ['--work-dir', tmp_path / 'run', '--cfg-options', *options]
    run('dist_train.sh', demo, 2, *arguments)
    checkpoint = load(tmp_path / 'run' / 'iter_2.pth')
    assert checkpoint['meta']['iter'] == 2
    assert np.isfinite(losses(checkpoint)).all()


def test_resume_from_nowhere(
    run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_here('train.py', 'seg.py', '--resume', 'absent.pth')
    assert 'argument --resume: there is no file absent.pth' in capsys.readouterr().err


def test_resume_from_weights_alone(
    run_here: RunHere, trained: dict[str, Path], tmp_path: Path
) -> None:
    weights = {'state_dict': load(trained['seg'])['state_dict']}
    torch.save(weights, tmp_path / 'weights.pth')
    where = ['--work-dir', str(tmp_path), '--resume', str(tmp_path / 'weights.pth')]
    with pytest.raises(SystemExit, match=r'from .*weights\.pth: .* leave --resume out'):
        run_here('train.py', 'seg.py', *where)


def test_the_first_start_of_a_run_that_resumes(
    run: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    """It starts from ``load_from``; a later start resumes."""
    where = ['--work-dir', tmp_path, '--resume']
    start = ['--cfg-options', f'load_from={trained["seg"]}', 'train_cfg.max_iters=2']
    first = run('train.py', 'seg.py', *where, *start).stdout
    assert f'Load checkpoint from {trained["seg"]}' in first
    assert 'Iter(train) [1/2]' in first
    start[-1] = 'train_cfg.max_iters=4'
    second = run('train.py', 'seg.py', *where, *start).stdout
    assert 'Iter(train) [3/4]' in second
    assert 'Iter(train) [1/4]' not in second


def test_resume_from_what_has_no_optimizer(
    run_here: RunHere, trained: dict[str, Path], tmp_path: Path
) -> None:
    """As the best checkpoints are."""
    best = load(trained['seg'])
    del best['optimizer']
    torch.save(best, tmp_path / 'best.pth')
    where = ['--work-dir', str(tmp_path), '--resume', str(tmp_path / 'best.pth')]
    with pytest.raises(SystemExit, match=r'resume from .*best\.pth: .* optimizer'):
        run_here('train.py', 'seg.py', *where)


def test_fewer_pictures_than_a_batch(run_here: RunHere, tmp_path: Path) -> None:
    options = ['batch_size=5', 'drop_last=True', 'sampler.type=DefaultSampler']
    options = [f'train_dataloader.{option}' for option in options]
    where = ['--work-dir', str(tmp_path), '--cfg-options', *options]
    message = r'4 pictures .* batch of 5 in each of 1 processes.* set .*batch_size'
    with pytest.raises(SystemExit, match=message):
        run_here('train.py', 'seg.py', *where)


def test_annotations_with_errors(
    run_here: RunHere, tools_folder: Path, tmp_path: Path
) -> None:
    content = json.loads((tools_folder / 'data' / 'instances.json').read_text())
    del content['annotations'][2]['segmentation']
    (tmp_path / 'spoilt.json').write_text(json.dumps(content))
    options = [f'train_dataloader.dataset.ann_file={tmp_path}/spoilt.json']
    where = ['--work-dir', str(tmp_path), '--cfg-options', *options]
    with pytest.raises(SystemExit, match=r'spoilt\.json has 1 errors.*annotation 3: '):
        run_here('train.py', 'det.py', *where)


def test_losses_that_are_not_finite(run_here: RunHere, tmp_path: Path) -> None:
    """The configs of other libraries say nothing of them, nor does this one."""
    options = ['--cfg-options', 'optim_wrapper.optimizer.lr=1e38']
    message = (
        r'iteration 2 is not finite\.\nProcess 0: decode\.loss_ce\. The first layer to '
        r'put out such values: backbone\.downsample_layers\.0\.1 \(LayerNorm\), .*'
        r'Pictures: \S*/pictures/\d\.png, \S*/pictures/\d\.png'
    )
    with pytest.raises(FloatingPointError, match=message):
        run_here('train.py', 'seg.py', '--work-dir', str(tmp_path), *options)


def test_auto_scale_lr_without_a_base_batch_size(run_here: RunHere) -> None:
    with pytest.raises(SystemExit, match='needs auto_scale_lr'):
        run_here('train.py', 'seg.py', '--auto-scale-lr')


@pytest.mark.parametrize(
    ('scope', 'dtype'), [('mmcnv2', 'bfloat16'), ('mmdet', None)], ids=str
)
def test_amp(scope: str, dtype: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cuda')
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    cfg = Config(dict(default_scope=scope, optim_wrapper=wrapper))
    runpy.run_path(str(ROOT / 'tools' / 'train.py'))['enable_amp'](cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    assert cfg.optim_wrapper.get('dtype') == dtype


@needs_cpu
def test_amp_on_cpu(run_here: RunHere) -> None:
    with pytest.raises(SystemExit, match='--amp needs an accelerator'):
        run_here('train.py', 'seg.py', '--amp')


def test_amp_with_another_wrapper(run_here: RunHere) -> None:
    options = ['--cfg-options', 'optim_wrapper.type=ApexOptimWrapper']
    with pytest.raises(SystemExit, match=r'optim_wrapper.type is ApexOptimWrapper'):
        run_here('train.py', 'seg.py', '--amp', *options)
