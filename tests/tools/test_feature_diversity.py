"""The tool for feature diversity, through its command line, against figures by hand."""

import csv
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from mmcnv2.evaluation import DiversityRecorder, feature_diversity
from mmcnv2.models import ConvNeXtV2
from mmcnv2.registry import MODELS
from mmcnv2.visualization import channel_grid, unpack_tokens

ROOT = Path(__file__).resolve().parents[2]
ARCH = dict(depths=(1, 1, 2, 1), dims=(4, 4, 8, 8))
BLOCKS = ['stages.0.0', 'stages.1.0', 'stages.2.0', 'stages.2.1', 'stages.3.0']
MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 55.0]

CONFIG = """
model = dict(
    type='mmcnv2.FCMAE',
    data_preprocessor=dict(
        type='mmcnv2.FCMAEDataPreprocessor', bgr_to_rgb=True,
        mean={mean}, std={std}),
    backbone=dict(type='{kind}', arch={arch}))
test_dataloader = dict(
    dataset=dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile')])))
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold a config, checkpoints of three kinds and three pictures."""
    folder = tmp_path_factory.mktemp('diversity')
    text = CONFIG.format(mean=MEAN, std=STD, arch=ARCH, kind='mmcnv2.ConvNeXtV2')
    (folder / 'config.py').write_text(text)
    for seed, run in enumerate(('fcmae', 'detector', 'official')):
        weights = build(seed).state_dict()
        if run != 'official':
            weights = {f'backbone.{key}': value for key, value in weights.items()}
        others = {'fcmae': 'neck.mask_token', 'detector': 'backbone.norm0.weight'}
        weights[others.get(run, 'norm.weight')] = torch.zeros(8)
        (folder / run).mkdir()
        key = 'model' if run == 'official' else 'state_dict'
        torch.save({key: weights}, folder / run / 'last.pth')
    (folder / 'pictures').mkdir()
    generator = np.random.default_rng(0)
    for name in ('a', 'b', 'c'):
        picture = generator.integers(0, 255, (70, 90, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / 'pictures' / f'{name}.png'), picture)
    return folder


def build(seed: int) -> ConvNeXtV2:
    torch.manual_seed(seed)
    backbone = ConvNeXtV2(arch=ARCH, out_indices=(3,), output_norm=False)
    for weight in backbone.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return backbone.eval()


def pictures(folder: Path) -> torch.Tensor:
    paths = sorted((folder / 'pictures').iterdir())
    return torch.stack([normalised(path, 96, MEAN, STD) for path in paths])


def normalised(
    path: Path, size: int, mean: list[float], std: list[float]
) -> torch.Tensor:
    picture = cv2.resize(cv2.imread(str(path)), (size, size))[..., ::-1]
    values = (picture - np.array(mean)) / std
    return torch.from_numpy(values).permute(2, 0, 1).float()


def masks(hidden: int) -> torch.Tensor:
    """Hide patches of pictures of 3 x 3, as FCMAE does in testing with seed 0."""
    found = []
    for place in range(3):
        generator = torch.Generator().manual_seed(place)
        order = torch.rand(1, 9, generator=generator).argsort()[0]
        mask = torch.ones(9, dtype=torch.bool)
        mask[order[: 9 - hidden]] = False
        found.append(mask.view(3, 3))
    return torch.stack(found)


def outputs(
    folder: Path, seed: int, mask: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Run all pictures at once, and keep what each block and each GELU gives."""
    backbone = build(seed)
    found = {}
    for name in BLOCKS:
        block = backbone.get_submodule(name)
        for layer, module in ((name, block), (f'{name}.act', block.act)):
            module.register_forward_hook(
                lambda _, __, out, layer=layer: found.update({layer: out})
            )
    with torch.no_grad():
        backbone(pictures(folder), mask)
    return found


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    tool = ROOT / 'tools' / 'analysis_tools' / 'feature_diversity.py'
    always = ['--input', 'pictures', '--out-dir', 'out', '--size', '96']
    always += ['--batch-size', '2', '--device', 'cpu']
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', [tool.name, *args, *always])
    runpy.run_path(str(tool), run_name='__main__')


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / 'out' / 'diversity.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def test_dense(folder, monkeypatch, capsys):
    runs = ('fcmae', 'detector', 'official')
    run(folder, monkeypatch, 'config.py', *[f'{name}/last.pth' for name in runs])
    found = rows(folder)
    assert list(found[0]) == (
        ['checkpoint', 'layer', 'depth', 'distance', 'dead', 'saturated']
    )
    assert len(found) == 3 * len(BLOCKS)
    for seed, name in enumerate(runs):
        expected = outputs(folder, seed, None)
        part = found[seed * len(BLOCKS) : (seed + 1) * len(BLOCKS)]
        for depth, (layer, row) in enumerate(zip(BLOCKS, part, strict=True), start=1):
            # All files have the same name, so it goes with the folder's.
            assert row['checkpoint'] == f'{name}_last'
            assert (row['layer'], row['depth']) == (layer, str(depth))
            numbers = [float(row[key]) for key in ('distance', 'dead', 'saturated')]
            means = feature_diversity(expected[layer]).mean(0).tolist()
            assert numbers == pytest.approx(means, abs=1e-5)
        maps = Image.open(folder / 'out' / f'channels_{name}_last.png')
        grid = channel_grid(expected['stages.2.0'][0])
        assert np.abs(np.asarray(maps).astype(int) - grid).max() <= 1
    with Image.open(folder / 'out' / 'diversity.png') as plot:
        assert min(plot.size) > 400
    printed = capsys.readouterr().out
    assert '3 pictures measured' in printed
    assert 'stages.2.0' in printed


def test_masked_and_other_layers(folder, monkeypatch):
    layers = ['--measure', 'stages.*.*.act', '--layer', 'stages.1.0']
    where = ['config.py', 'detector/last.pth']
    run(folder, monkeypatch, *where, *layers, '--mask-ratio', '0.6')
    mask = masks(hidden=6)
    expected = outputs(folder, 1, mask)
    found = rows(folder)
    assert [row['layer'] for row in found] == [f'{name}.act' for name in BLOCKS]
    assert [row['depth'] for row in found] == list('12345')
    for row in found:
        assert row['checkpoint'] == 'last'
        distance, _, saturated = feature_diversity(expected[row['layer']]).mean(0)
        assert float(row['distance']) == pytest.approx(float(distance), abs=1e-5)
        assert float(row['saturated']) == pytest.approx(float(saturated), abs=1e-5)
    grid = channel_grid(unpack_tokens(expected['stages.1.0'][0], mask[0]))
    maps = np.asarray(Image.open(folder / 'out' / 'channels_last.png')).astype(int)
    assert np.abs(maps - grid).max() <= 1


def test_both_versions(folder, monkeypatch):
    """One config will do for checkpoints with GRN and without."""
    v2 = build(1).state_dict()
    for value in (value for name, value in v2.items() if '.grn.' in name):
        value.zero_()
    v1 = {name: value for name, value in v2.items() if '.grn.' not in name}
    # What does nothing, like the GRN above.
    v1 |= {f'{b}.gamma': torch.ones_like(v2[f'{b}.norm.weight']) for b in BLOCKS}
    torch.save(v2, folder / 'v2.pth')
    torch.save(v1, folder / 'v1.pth')
    run(folder, monkeypatch, 'config.py', 'v2.pth', 'v1.pth')
    found = [float(row['distance']) for row in rows(folder)]
    assert found[: len(BLOCKS)] == pytest.approx(found[len(BLOCKS) :], abs=1e-5)
    assert len(set(found)) > 1


@pytest.mark.parametrize('name', ['det', 'seg'])
def test_whole_models(run_here, tools_folder, name):
    """A detector and a segmentor, by configs with bases."""
    cfg = Config.fromfile(tools_folder / f'{name}.py')
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    torch.save({'state_dict': model.state_dict()}, tools_folder / f'{name}.pth')
    paths = sorted((tools_folder / 'data' / 'pictures').iterdir())
    settings = cfg.model.data_preprocessor
    mean, std = settings.mean, settings.std
    inputs = torch.stack([normalised(path, 64, mean, std) for path in paths])
    recorder = DiversityRecorder(model.backbone)
    recorder.start()
    model.backbone(inputs)

    where = ['--input', str(paths[0].parent), '--out-dir', name, '--size', '64']
    tool = 'analysis_tools/feature_diversity.py'
    run_here(tool, f'{name}.py', f'{name}.pth', *where, '--device', 'cpu')
    with (tools_folder / name / 'diversity.csv').open(newline='') as file:
        found = {row['layer']: float(row['distance']) for row in csv.DictReader(file)}
    expected = {layer: row['distance'] for layer, row in recorder.result().items()}
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['fcmae/last.pth', 'fcmae/last.pth'], 'same checkpoint is given twice'),
        (['fcmae/last.pth', '--measure', 'stages'], "no layer .* named 'stages'"),
        (['fcmae/last.pth', '--mask-ratio', '0.99'], 'leaves 0 of the 9 patches'),
        (
            ['other.pth'],
            r"other\.pth: .* 'stages\.3\.0\.norm\.weight' is absent .* of config\.py",
        ),
        (['deeper.pth'], r"'stages\.2\.2\.norm\.weight' is \(8,\) there, and absent"),
        (['wider.pth'], r'wider\.pth: .* is \(9,\) there, and \(8,\)'),
    ],
)
def test_says_what_is_wrong(folder, monkeypatch, args, message):
    weights = build(0).state_dict()
    weights['stages.2.2.norm.weight'] = torch.ones(8)
    torch.save({'state_dict': weights}, folder / 'deeper.pth')
    weights['stages.2.0.norm.weight'] = torch.ones(9)
    torch.save({'state_dict': weights}, folder / 'wider.pth')
    weights = build(0).state_dict()
    del weights['stages.3.0.norm.weight']
    torch.save({'state_dict': weights}, folder / 'other.pth')
    with pytest.raises((SystemExit, ValueError), match=f'(?s){message}'):
        run(folder, monkeypatch, 'config.py', *args)


def test_only_our_backbone(folder, monkeypatch):
    text = CONFIG.format(mean=MEAN, std=STD, arch=ARCH, kind='mmdet.ResNet')
    (folder / 'resnet.py').write_text(text)
    with pytest.raises(SystemExit, match=r'type mmdet\.ResNet, but only a ConvNeXtV2'):
        run(folder, monkeypatch, 'resnet.py', 'fcmae/last.pth')
