"""``get_flops.py``, ``browse_dataset.py`` and ``print_config.py``."""

import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

RunHere = Callable[..., None]
Output = pytest.CaptureFixture[str]


def table(output: str) -> dict[str, tuple[float, float]]:
    """Read millions of parameters and billions of multiply-adds of each part."""
    rows = re.findall(r'^(\w+) +(\S+) M +(\S+) G$', output, re.MULTILINE)
    return {name: (float(params), float(adds)) for name, params, adds in rows}


# Of a classifier's features at 224 x 224, as in tests/models/test_convnextv2.py, and of
# the last norm, which a classifier runs on their mean, a backbone on 7 x 7 positions.
@pytest.mark.parametrize(
    ('arch', 'dim', 'published'),
    [('atto', 320, 551_718_080), ('pico', 512, 1_374_072_320)],
)
def test_multiply_adds_are_the_published(
    run_here: RunHere, capsys: Output, arch: str, dim: int, published: int
) -> None:
    sizes = [f'model.backbone.arch={arch}', f'model.decode_head.in_channels={dim}']
    run_here('analysis_tools/get_flops.py', 'seg.py', '--cfg-options', *sizes)
    last_norm = 5 * dim * (7 * 7 - 1)
    adds = table(capsys.readouterr().out)['backbone'][1]
    assert adds == pytest.approx((published + last_norm) / 1e9, rel=1e-3)


def test_flops_of_a_detector(run_here: RunHere, capsys: Output) -> None:
    def count(*args: str) -> dict[str, tuple[float, float]]:
        run_here('analysis_tools/get_flops.py', 'det.py', *args)
        return table(capsys.readouterr().out)

    small, wide = count('--shape', '64'), count('--shape', '64', '128')
    names = ['backbone', 'neck', 'rpn_head', 'roi_head', 'all']
    assert list(small) == list(wide) == names
    for column in (0, 1):
        whole = sum(small[name][column] for name in names[:-1])
        assert small['all'][column] == pytest.approx(whole, rel=1e-2)
    for name in ('backbone', 'rpn_head'):
        assert wide[name][1] == pytest.approx(2 * small[name][1], rel=1e-3)
        assert wide[name][0] == small[name][0]


def test_flops_say_what_is_left_out(run_here: RunHere, capsys: Output) -> None:
    run_here('analysis_tools/get_flops.py', 'seg.py', '--shape', '64')
    output = capsys.readouterr().out
    assert 'One picture of 64 x 64 pixels' in output
    assert re.search(r'Counted, .*: conv .* G, layer_norm .* G, linear .* G', output)
    assert re.search(r'Not counted: .*gelu \(4\).*vector_norm \(4\)', output)


def test_flops_of_visible_patches(run_here: RunHere, capsys: Output) -> None:
    def count(ratio: float) -> dict[str, tuple[float, float]]:
        options = [f'model.mask_ratio={ratio}', 'model.neck.decoder_dim=16']
        args = ['--shape', '128', '--cfg-options', *options]
        run_here('analysis_tools/get_flops.py', 'fcmae.py', *args)
        output = capsys.readouterr().out
        assert f'{ratio:.0%} of it hidden' in output
        return table(output)

    most, half = count(0.75), count(0.5)
    assert list(most) == ['backbone', 'neck', 'all']
    # Pointwise layers, stem and downsampling; of 16 patches 4 or 8 are visible.
    per_patch = sum(
        side**2 * (dim * 4 * dim * 2 + previous)
        for side, dim, previous in (
            (8, 8, 8 * 3 * 16),
            (4, 8, 8 * 8 * 4),
            (2, 16, 16 * 8 * 4),
            (1, 16, 16 * 16 * 4),
        )
    )
    difference = half['backbone'][1] - most['backbone'][1]
    assert difference == pytest.approx(4 * per_patch / 1e9, rel=1e-2)


@pytest.mark.parametrize(
    ('config', 'args', 'message'),
    [
        ('seg.py', ['--shape', '1', '2', '3'], 'one or two sides, not 3'),
        ('absent.py', [], 'there is no file absent.py'),
    ],
)
def test_wrong_arguments(
    run_here: RunHere, capsys: Output, config: str, args: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        run_here('analysis_tools/get_flops.py', config, *args)
    assert message in capsys.readouterr().err


def browse(run_here: RunHere, config: str, folder: Path, *args: str) -> list:
    where = ['--output-dir', str(folder), '--not-show']
    run_here('analysis_tools/browse_dataset.py', config, *where, *args)
    return [cv2.imread(str(path)) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize('config', ['det.py', 'seg.py'])
def test_browse_labels(
    run_here: RunHere, tools_folder: Path, tmp_path: Path, config: str
) -> None:
    painted = browse(run_here, config, tmp_path / 'out', '--number', '2')
    assert len(painted) == 2
    for i, picture in enumerate(painted):
        plain = cv2.imread(str(tools_folder / 'data' / 'pictures' / f'{i}.png'))
        box = cv2.imread(str(tools_folder / 'data' / 'maps' / f'{i}.png'))[..., 0] == 1
        changed = np.abs(picture.astype(int) - plain).sum(-1)
        assert picture.shape == plain.shape
        # It is the grey box that is painted over in a colour.
        assert np.median(plain[box].std(-1)) == 0
        assert np.median(picture[box].std(-1)) > 10
        assert np.median(changed[box]) > 20


def test_browse_pretraining(
    run_here: RunHere, tools_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    painted = browse(run_here, 'fcmae.py', tmp_path / 'out')
    assert len(painted) == 4
    assert f'4 pictures are in {tmp_path / "out"}.' in capsys.readouterr().out
    for i, picture in enumerate(painted):
        plain = cv2.imread(str(tools_folder / 'data' / 'pictures' / f'{i}.png'))
        left, right = picture[:, :96], picture[:, 96:]
        np.testing.assert_array_equal(left, plain)
        hidden = (right == 128).all(-1).reshape(2, 32, 3, 32).all((1, 3))
        assert hidden.sum() == 4, '0.6 of 2 x 3 patches, as FCMAE rounds it'
        shown = ~hidden.repeat(32, 0).repeat(32, 1)
        np.testing.assert_array_equal(right[shown], plain[shown])
    again = browse(run_here, 'fcmae.py', tmp_path / 'again')
    other = browse(run_here, 'fcmae.py', tmp_path / 'other', '--seed', '1')
    assert np.array_equal(painted, again)
    assert not np.array_equal(painted, other)


def test_browse_errors(run_here: RunHere, capsys: Output) -> None:
    with pytest.raises(SystemExit):
        run_here('analysis_tools/browse_dataset.py', 'seg.py', '--not-show')
    assert 'nothing to do without --output-dir' in capsys.readouterr().err
    other = ['--cfg-options', 'default_scope=mmpretrain']
    with pytest.raises(SystemExit, match='default_scope is mmpretrain'):
        run_here('analysis_tools/browse_dataset.py', 'seg.py', *other)


def test_print_config(run_here: RunHere, tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / 'new' / 'whole.py'
    options = ['--cfg-options', 'model.backbone.arch=nano', 'train_cfg.max_iters=7']
    run_here(
        'analysis_tools/print_config.py', 'seg.py', '--save-path', str(path), *options
    )
    printed = capsys.readouterr().out
    for text in (printed, path.read_text()):
        cfg = Config.fromstring(text, '.py')
        assert cfg.model.backbone.arch == 'nano'
        assert cfg.train_cfg.max_iters == 7
        # From the base config.
        assert cfg.model.type == 'EncoderDecoder'
        assert '_base_' not in text


def test_print_config_to_an_unknown_format(run_here: RunHere, capsys: Output) -> None:
    with pytest.raises(SystemExit):
        run_here('analysis_tools/print_config.py', 'seg.py', '--save-path', 'a.txt')
    assert 'a.txt does not end in .py, .json, .yml' in capsys.readouterr().err
