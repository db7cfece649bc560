"""The inferencer against the model called by hand, and the tool over it."""

import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.infer import BaseInferencer
from mmengine.registry import INFERENCERS
from mmengine.structures import BaseDataElement

from mmcnv2.apis import FCMAEInferencer
from mmcnv2.evaluation import hidden_psnr
from mmcnv2.models import FCMAE
from mmcnv2.visualization import reconstruction_grid

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
custom_imports = dict(imports=['mmcnv2'])
model = dict(
    type='mmcnv2.FCMAE',
    data_preprocessor=dict(
        type='mmcnv2.FCMAEDataPreprocessor', bgr_to_rgb=True,
        mean=[120.0, 110.0, 100.0], std=[60.0, 50.0, 55.0]),
    backbone=dict(
        type='mmcnv2.ConvNeXtV2',
        arch=dict(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))),
    neck=dict(type='mmcnv2.FCMAEDecoder', decoder_dim=8),
    head=dict(type='mmcnv2.FCMAEHead'))
test_dataloader = dict(
    dataset=dict(
        type='mmcnv2.UnlabelledImages', data_root='nowhere', pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(96, 64)),
            dict(type='mmcnv2.PackPretrainInputs')]))
"""
PICTURES = ('a.png', 'a.bmp', 'deeper/a.png', 'deeper/b.png')


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold ``config.py``, ``model.pth`` and four pictures below ``pictures``."""
    folder = tmp_path_factory.mktemp('inferencer')
    (folder / 'config.py').write_text(CONFIG)
    torch.manual_seed(0)
    torch.save({'state_dict': build().state_dict()}, folder / 'model.pth')
    generator = np.random.default_rng(0)
    for name in PICTURES:
        path = folder / 'pictures' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), generator.integers(0, 255, (70, 90, 3), dtype=np.uint8))
    return folder


@pytest.fixture(scope='module')
def inferencer(folder: Path) -> FCMAEInferencer:
    return FCMAEInferencer(str(folder / 'config.py'), str(folder / 'model.pth'), 'cpu')


def build() -> FCMAE:
    arguments = Config.fromstring(CONFIG, '.py').model
    arguments.pop('type')
    model = FCMAE(**arguments)
    model.init_weights()
    return model.eval()


def paths(folder: Path) -> list[str]:
    return sorted(str(folder / 'pictures' / name) for name in PICTURES)


def by_hand(folder: Path, path: str, place: int) -> BaseDataElement:
    """Predict for a picture without the inferencer, pipeline and preprocessor."""
    model = build()
    model.load_state_dict(torch.load(folder / 'model.pth')['state_dict'])
    picture = cv2.resize(cv2.imread(path), (96, 64))[..., ::-1]
    normalised = (picture - np.array([120.0, 110, 100])) / [60, 50, 55]
    inputs = torch.from_numpy(normalised).permute(2, 0, 1)[None].float()
    element = BaseDataElement(metainfo={'sample_idx': place})
    with torch.no_grad():
        return model(inputs, [element], mode='predict')[0]


@pytest.mark.parametrize('batch_size', [1, 3])
def test_folder(inferencer, folder, batch_size):
    results = inferencer(
        str(folder / 'pictures'), batch_size=batch_size, return_reconstruction=True
    )
    assert results['visualization'] == []
    predictions = results['predictions']
    assert [each['img_path'] for each in predictions] == paths(folder)
    for place, found in enumerate(predictions):
        expected = by_hand(folder, found['img_path'], place)
        psnr = hidden_psnr(expected.mask, expected.picture, expected.reconstruction)
        assert found['loss'] == pytest.approx(float(expected.loss), rel=1e-4)
        assert found['psnr'] == pytest.approx(psnr, abs=1e-3)
        np.testing.assert_allclose(
            found['reconstruction'], expected.reconstruction.numpy(), atol=0.01
        )


def test_arrays_paths_and_folders_together(inferencer, folder):
    first, *others = paths(folder)
    array = cv2.imread(first)
    inputs = [array, Path(others[0]), folder / 'pictures' / 'deeper']
    found = inferencer(inputs, batch_size=2)['predictions']
    assert [each['img_path'] for each in found] == [None, *others]
    assert found[0]['loss'] == pytest.approx(
        float(by_hand(folder, first, 0).loss), 1e-4
    )


def test_data_samples_and_grids(inferencer, folder):
    results = inferencer(paths(folder)[1], return_datasamples=True, return_vis=True)
    (sample,), (grid,) = results['predictions'], results['visualization']
    assert torch.equal(sample.mask, by_hand(folder, paths(folder)[1], 0).mask)
    assert np.array_equal(grid, reconstruction_grid([sample]))


def test_files_of_grids(inferencer, folder, tmp_path):
    results = inferencer(folder / 'pictures', out_dir=tmp_path, return_vis=True)
    # In the order of the paths; a.bmp and a.png would have the same name.
    names = ['a.png', 'a_1.png', 'deeper/a.png', 'deeper/b.png']
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*.png')]
    assert sorted(files) == names
    for name, grid in zip(names, results['visualization'], strict=True):
        assert np.array_equal(cv2.imread(str(tmp_path / name))[..., ::-1], grid)


def test_no_grid_takes_the_place_of_another(inferencer, folder, tmp_path):
    names = ('x/a_2.png', 'x/a.png', 'y/a.png')
    pictures = [tmp_path / name for name in names]
    for i, picture in enumerate(pictures):
        picture.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(picture), np.full((64, 96, 3), i, np.uint8))
    out = tmp_path / 'out'
    grids = inferencer(pictures, out_dir=out, return_vis=True)['visualization']
    for name, grid in zip(('a_2', 'a', 'a_3'), grids, strict=True):
        assert np.array_equal(cv2.imread(str(out / f'{name}.png'))[..., ::-1], grid)


def test_config_from_the_checkpoint(inferencer, folder, tmp_path):
    checkpoint = torch.load(folder / 'model.pth')
    torch.save({**checkpoint, 'meta': {'cfg': CONFIG}}, tmp_path / 'whole.pth')
    alone = FCMAEInferencer(weights=str(tmp_path / 'whole.pth'), device='cpu')
    path = paths(folder)[0]
    assert alone(path)['predictions'] == inferencer(path)['predictions']


def test_is_in_the_registry(folder):
    arguments = dict(model=str(folder / 'config.py'), weights=str(folder / 'model.pth'))
    inferencer = INFERENCERS.build(dict(type='mmcnv2.FCMAEInferencer', **arguments))
    assert isinstance(inferencer, FCMAEInferencer)
    assert isinstance(inferencer, BaseInferencer)


def test_config_as_an_object_with_wrapped_dataset(folder):
    config = Config.fromfile(folder / 'config.py')
    wrapped = dict(
        type='RepeatDataset', times=1, dataset=config.test_dataloader.dataset
    )
    config.test_dataloader.dataset = wrapped
    found = FCMAEInferencer(config, str(folder / 'model.pth'), 'cpu')(paths(folder)[0])
    expected = float(by_hand(folder, paths(folder)[0], 0).loss)
    assert found['predictions'][0]['loss'] == pytest.approx(expected, rel=1e-4)


def test_weights_of_another_model_are_refused(folder, tmp_path):
    weights = {
        key: value
        for key, value in build().state_dict().items()
        if key.startswith('backbone')
    }
    torch.save({'state_dict': weights}, tmp_path / 'other.pth')
    with pytest.raises(RuntimeError, match=r'missing keys .*neck'):
        FCMAEInferencer(str(folder / 'config.py'), str(tmp_path / 'other.pth'), 'cpu')


@pytest.mark.parametrize(
    ('content', 'error', 'message'),
    [
        (None, FileNotFoundError, r'There is no picture .*x\.png'),
        (b'no picture', RuntimeError, r'Cannot read the picture .*x\.png'),
    ],
)
def test_says_which_file_is_wrong(inferencer, tmp_path, content, error, message):
    path = tmp_path / 'x.png'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        inferencer(str(path))


def test_configs_of_other_models_are_refused():
    config = ROOT / 'configs' / 'demo' / 'upernet_convnextv2-atto_demo.py'
    with pytest.raises(TypeError, match=r'of EncoderDecoder, .* takes FCMAE'):
        FCMAEInferencer(config)


def test_missing_config_and_empty_folder(inferencer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.py'):
        FCMAEInferencer(tmp_path / 'none.py')
    with pytest.raises(FileNotFoundError, match='There is no picture in'):
        inferencer(tmp_path)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['none'], r'There is no picture .*none'),
        (['pictures', '--batch-size', '0'], '2'),
    ],
)
def test_tool_stops_with_a_message(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    out = ['--out-dir', str(tmp_path / 'out'), '--device', 'cpu']
    argv = ['reconstruct.py', 'config.py', 'model.pth', *arguments, *out]
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(ROOT / 'tools' / 'reconstruct.py'), run_name='__main__')


def test_tool(folder, tmp_path, monkeypatch, capsys):
    where = ['config.py', 'model.pth', 'pictures']
    out = ['--out-dir', str(tmp_path / 'out'), '--device', 'cpu', '--batch-size', '2']
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', ['reconstruct.py', *where, *out])
    runpy.run_path(str(ROOT / 'tools' / 'reconstruct.py'), run_name='__main__')
    assert len(list((tmp_path / 'out').rglob('*.png'))) == 4
    printed = capsys.readouterr().out
    losses = []
    for place, path in enumerate(sorted(f'pictures/{name}' for name in PICTURES)):
        expected = by_hand(folder, str(folder / path), place)
        losses.append(float(expected.loss))
        assert f'loss {losses[-1]:.4f}' in printed
        assert path in printed
    assert f'mean loss of 4 pictures: {np.mean(losses):.4f}' in printed
