"""``tools/test.py`` and ``dist_test.sh`` from the command line."""

import functools
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmcnv2.registry import MODELS

Run = Callable[..., CompletedProcess]
RunHere = Callable[..., None]


def assert_painted(folder: Path, pictures: Path, count: int) -> None:
    painted = sorted(folder.rglob('*.png'))
    assert len(painted) == count
    plain = cv2.imread(str(pictures / '0.png'))
    assert not np.array_equal(cv2.imread(str(painted[0])), plain)


def test_detection(
    run: Run, trained: dict[str, Path], tools_folder: Path, tmp_path: Path
) -> None:
    out = ['--out', tmp_path / 'out.pkl', '--show-dir', tmp_path / 'shown']
    where = ['--work-dir', tmp_path / 'run']
    output = run('test.py', 'det.py', trained['det'], *where, *out).stdout
    assert 'coco/bbox_mAP' in output
    assert 'coco/segm_mAP' in output
    predictions = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert len(predictions) == 4
    masks = predictions[0]['pred_instances']['masks']
    assert masks[0]['size'] == [64, 96], 'masks are run-length encoded'
    assert_painted(tmp_path / 'shown', tools_folder / 'data' / 'pictures', 4)


def test_segmentation(
    run: Run, trained: dict[str, Path], tools_folder: Path, tmp_path: Path
) -> None:
    out = ['--out', tmp_path / 'maps', '--show-dir', tmp_path / 'shown']
    where = ['--work-dir', tmp_path / 'run']
    # A list of metrics, of which some write files of their own kind.
    config = tools_folder / 'two_metrics.py'
    config.write_text(
        "_base_ = './seg.py'\n"
        "dump = dict(type='DumpResults', out_file_path='{{fileDirname}}/out.pkl')\n"
        'test_evaluator = [{{_base_.test_evaluator}}, dump]\n'
    )
    output = run('test.py', config, trained['seg'], *where, *out).stdout
    assert 'mIoU' in output
    assert len(pickle.loads((tools_folder / 'out.pkl').read_bytes())) == 4
    maps = sorted((tmp_path / 'maps').iterdir())
    assert [path.name for path in maps] == ['0.png', '1.png', '2.png', '3.png']
    label = cv2.imread(str(maps[0]), cv2.IMREAD_UNCHANGED)
    assert label.shape == (64, 96)
    assert label.max() <= 1
    assert_painted(tmp_path / 'shown', tools_folder / 'data' / 'pictures', 4)


def figures(output: str) -> dict[str, float]:
    """Read the loss and PSNR that the log ends with."""
    found = re.findall(r'fcmae/(loss|psnr): ([\d.]+)', output)
    return {name: float(value) for name, value in found}


def test_pretraining(run: Run, tools_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = Config.fromfile(tools_folder / 'fcmae.py', import_custom_modules=False)
    init_default_scope('mmcnv2')
    model = MODELS.build(cfg.model)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    where = ['--work-dir', tmp_path / 'run']
    shown = ['--show-dir', tmp_path / 'shown', '--out', tmp_path / 'out.pkl']
    test = functools.partial(run, 'test.py', 'fcmae.py', tmp_path / 'model.pth')
    output = test(*where, *shown).stdout
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == 4
    losses = [
        float(each['loss'])
        for each in pickle.loads((tmp_path / 'out.pkl').read_bytes())
    ]
    assert figures(output)['loss'] == pytest.approx(np.mean(losses), abs=1e-4)
    # The masks depend on the pictures alone, so two processes find the same.
    two = test(*where, processes=2).stdout
    assert figures(two) == pytest.approx(figures(output), abs=2e-4)


def test_two_processes_with_tta(
    run: Run, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('PORT', '29534')
    args = ['--work-dir', tmp_path / 'run', '--tta', '--out', tmp_path / 'maps']
    output = run('dist_test.sh', 'seg.py', trained['seg'], 2, *args).stdout
    assert 'mIoU' in output
    assert len(list((tmp_path / 'maps').iterdir())) == 4
    cfg = Config.fromfile(tmp_path / 'run' / 'seg.py')
    assert cfg.model.type == 'SegTTAModel'
    assert cfg.model.module.type == 'EncoderDecoder'
    assert cfg.test_dataloader.dataset.pipeline == cfg.tta_pipeline


def test_checkpoint_of_a_part(
    run_here: RunHere, trained: dict[str, Path], tmp_path: Path
) -> None:
    whole = torch.load(trained['seg'], weights_only=True)['state_dict']
    part = {name: whole[name] for name in whole if name.startswith('backbone.')}
    torch.save({'state_dict': part}, tmp_path / 'part.pth')
    where = ['--work-dir', str(tmp_path / 'run')]
    message = r'lacks 6 of 64 parameters .*, decode_head\.conv_seg\.bias'
    with pytest.raises(SystemExit, match=message):
        run_here('test.py', 'seg.py', str(tmp_path / 'part.pth'), *where)


def test_no_checkpoint(run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_here('test.py', 'seg.py', 'absent.pth')
    assert 'there is no file absent.pth' in capsys.readouterr().err


def test_tta_without_a_tta_model(run_here: RunHere, trained: dict[str, Path]) -> None:
    with pytest.raises(SystemExit, match='needs tta_model and tta_pipeline'):
        run_here('test.py', 'det.py', str(trained['det']), '--tta')


def test_show_without_a_hook(run_here: RunHere, trained: dict[str, Path]) -> None:
    no_hook = ['--cfg-options', 'default_hooks.visualization=None']
    with pytest.raises(SystemExit, match=r'need default_hooks.visualization'):
        run_here('test.py', 'seg.py', str(trained['seg']), '--show', *no_hook)
