"""The metric against a plain loop over all pairs of channels."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmcnv2.evaluation import DiversityRecorder, feature_diversity, find_layers
from mmcnv2.models import ConvNeXtV2

TINY = dict(depths=(1, 1, 2, 1), dims=(4, 4, 8, 8))
SHAPES = [(2, 5, 7, 3), (1, 9, 16), (3, 1, 1, 4), (1, 3, 1), (2, 2, 3, 2, 5)]


def by_pairs(maps: Tensor) -> float:
    """Average over all pairs that have a cosine, of maps (positions, C), in float64."""
    columns = maps.detach().double().flatten(0, -2).T
    columns = [column for column in columns if column.any()]
    distances = [
        (1 - float(one @ other / (one.norm() * other.norm()))) / 2
        for one in columns
        for other in columns
    ]
    return sum(distances) / len(distances) if distances else 0.0


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(
    'dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32]
)
def test_distance(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    # With a common part, as of features; the same for all channels of the last picture.
    features = torch.randn(shape, generator=generator) + 0.5
    features[-1] = features[-1, ..., :1]
    features = (10 * features).to(dtype)
    found = feature_diversity(features)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.tensor([by_pairs(picture) for picture in features])
    torch.testing.assert_close(found[:, 0].float(), expected, atol=2e-6, rtol=0)
    assert (found >= 0).all()


@pytest.mark.parametrize(
    ('dtype', 'scale'),
    [(torch.float16, 6e4), (torch.float32, 1e37), (torch.float32, 1e-37)],
)
def test_values_whose_squares_no_type_holds(dtype, scale):
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(2, 40, 60, 6, generator=generator)
    expected = feature_diversity(features)
    found = feature_diversity((features * scale).to(dtype))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_known_distances():
    ramp = torch.arange(1.0, 7)
    alike = torch.stack([ramp, 2 * ramp, 0.1 * ramp], -1)
    opposite = torch.stack([ramp, -ramp], -1)
    orthogonal = torch.eye(6)
    for maps, expected in ((alike, 0), (opposite, 0.5), (orthogonal, (1 - 1 / 6) / 2)):
        distance = feature_diversity(maps[None])[0, 0]
        assert float(distance) == pytest.approx(expected, abs=1e-6)


def test_dead_and_saturated():
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(8, 9, 12, generator=generator)
    maps[..., 1] = 0
    # Nine channels reach about 2.5, so 1 % of the mean is near 0.02.
    maps[..., 5] = maps[..., 5].sign() * 0.01
    maps[..., 7] = 0.1 * maps[..., 7].sign()
    # Ripples of half a percent and of two percent of the level.
    maps[..., 2] = -3 * (1 + 0.005 * maps[..., 2].sign())
    maps[..., 3] = 3 * (1 + 0.02 * maps[..., 3].sign())
    distance, dead, saturated = feature_diversity(maps[None])[0].tolist()
    assert dead == pytest.approx(2 / 12)
    assert saturated == pytest.approx(1 / 12)
    # The map of zeros is in no pair; the other dead one is, as it has a direction.
    assert distance == pytest.approx(by_pairs(maps), abs=1e-6)
    # Shares are of each picture, not of the batch, and know no unit.
    both = feature_diversity(1000 * torch.stack([maps, maps.roll(1, 2)]))
    torch.testing.assert_close(both[0], both[1])
    torch.testing.assert_close(both[0], torch.tensor([distance, dead, saturated]))


def test_nothing_alive():
    found = feature_diversity(torch.zeros(2, 3, 3, 4))
    assert found.tolist() == [[0, 1, 0]] * 2


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_finite_shows(value):
    features = torch.rand(1, 5, 4)
    features[0, 2, 1] = value
    assert feature_diversity(features)[0, 0].isnan()


def test_no_gradient_and_no_change():
    features = torch.randn(2, 5, 4, requires_grad=True)
    before = features.detach().clone()
    assert not feature_diversity(features).requires_grad
    assert torch.equal(features, before)


def test_too_few_dimensions():
    with pytest.raises(ValueError, match=r'\(N, \.\.\., C\) expected.*\(5, 4\)'):
        feature_diversity(torch.rand(5, 4))


@pytest.fixture
def backbone() -> ConvNeXtV2:
    return build()


def build() -> ConvNeXtV2:
    torch.manual_seed(0)
    backbone = ConvNeXtV2(arch=TINY, out_indices=(3,), output_norm=False)
    backbone.init_weights()
    return backbone.eval()


def test_find_layers(backbone):
    blocks = ['stages.0.0', 'stages.1.0', 'stages.2.0', 'stages.2.1', 'stages.3.0']
    assert list(find_layers(backbone)) == blocks
    # In the backbone's order, whatever the order of the patterns, and each once.
    found = find_layers(backbone, ['stages.2.*.act', 'stages.0.0', 'stages.2.1.act'])
    assert list(found) == ['stages.0.0', 'stages.2.0.act', 'stages.2.1.act']
    assert found['stages.2.1.act'] is backbone.stages[2][1].act


@pytest.mark.parametrize('name', ['stages.4.0', 'stages.0.0.dwconv', 'stages.0', 'sta'])
def test_unknown_layers(backbone, name):
    with pytest.raises(ValueError, match=f"named '{name}'; give blocks"):
        find_layers(backbone, [name])


@pytest.mark.parametrize('masked', [False, True])
def test_recorder(backbone, masked):
    """Means over all pictures, of what the layers give in their own forward passes."""
    pictures = torch.randn(3, 3, 64, 96)
    mask = torch.tensor([[True, False, True], [False, True, False]]).expand(3, 2, 3)
    mask = mask if masked else None
    block = backbone.stages[0][0]
    expanded = []
    handle = block.grn.register_forward_pre_hook(lambda _, args: expanded.append(*args))
    (last,) = backbone(pictures, mask)
    handle.remove()

    recorder = DiversityRecorder(backbone, ['stages.0.0.act', 'stages.3.0'])
    recorder.start()
    backbone(torch.ones_like(pictures), mask)
    # Starting anew forgets.
    recorder.start()
    for part in (slice(0, 2), slice(2, 3)):
        backbone(pictures[part], None if mask is None else mask[part])
    recorder.stop()
    backbone(torch.ones_like(pictures), mask)

    last = last if masked else last.permute(0, 2, 3, 1)
    expected = {'stages.0.0.act': expanded[0], 'stages.3.0': last}
    found = recorder.result()
    assert list(found) == list(expected)
    for name, features in expected.items():
        assert features.shape[-1] == (16 if name.endswith('act') else 8)
        distance = sum(map(by_pairs, features)) / 3
        assert found[name]['distance'] == pytest.approx(distance, abs=1e-5)
        shares = feature_diversity(features)[:, 1:].mean(0).tolist()
        assert [found[name]['dead'], found[name]['saturated']] == pytest.approx(shares)


def test_recorder_that_saw_nothing(backbone):
    recorder = DiversityRecorder(backbone, ['stages.1.0'])
    with pytest.raises(RuntimeError, match=r'stages\.1\.0 did not run'):
        recorder.result()
    recorder.start()
    with pytest.raises(RuntimeError, match=r'stages\.1\.0 did not run'):
        recorder.result()


def one_of_two(rank: int, folder: Path) -> None:
    """Run one picture in the first process and two in the second."""
    # What is forked has no threads to share work with.
    torch.set_num_threads(1)
    store = f'file://{folder / "store"}'
    torch.distributed.init_process_group('gloo', store, rank=rank, world_size=2)
    backbone, pictures = build(), torch.load(folder / 'pictures.pt')
    recorder = DiversityRecorder(backbone)
    recorder.start()
    backbone(pictures[:1] if rank == 0 else pictures[1:])
    torch.save(recorder.result(), folder / f'{rank}.pt')
    torch.distributed.destroy_process_group()


def test_recorder_in_two_processes(backbone, tmp_path):
    pictures = torch.randn(3, 3, 64, 64)
    torch.save(pictures, tmp_path / 'pictures.pt')
    torch.multiprocessing.start_processes(
        one_of_two, (tmp_path,), nprocs=2, start_method='fork'
    )
    recorder = DiversityRecorder(backbone)
    recorder.start()
    backbone(pictures)
    for rank in (0, 1):
        found = torch.load(tmp_path / f'{rank}.pt')
        assert list(found) == list(recorder.result())
        for name, values in recorder.result().items():
            assert found[name] == pytest.approx(values, abs=1e-6)
