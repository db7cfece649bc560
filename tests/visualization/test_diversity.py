"""What the plot and the grid of channel maps show."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mmcnv2.models.layouts import PackedLayout
from mmcnv2.visualization import channel_grid, diversity_plot, unpack_tokens

RED, BLUE, GREY = (103, 0, 31), (5, 48, 97), (153, 153, 153)


def test_plot_has_a_line_for_each():
    lines = {'v1': ([1, 2, 4], [0.4, 0.2, 0.1]), 'v2': ([1, 2, 4], [0.4, 0.3, 0.35])}
    figure = diversity_plot(lines)
    [axes] = figure.axes
    for line, (name, values) in zip(axes.lines, lines.items(), strict=True):
        assert line.get_label() == name
        assert np.array_equal(line.get_xydata().T, values)
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words == ['v1', 'v2']
    assert axes.get_ylim() == pytest.approx((0, 1.05 * 0.4))


def test_unpack_tokens():
    """Against the stem of the layout that packs them, on pictures of counted pixels."""
    mask = torch.tensor([[True, False, False], [False, True, False]])
    conv = nn.Conv2d(2, 2, kernel_size=4, stride=4)
    picture = torch.randn(1, 2, 64, 96)
    with torch.no_grad():
        [tokens] = PackedLayout(mask[None], num_visible=4).stem(conv, picture)
        dense = conv(picture)[0].permute(1, 2, 0)
    hidden = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    found = unpack_tokens(tokens, mask)
    assert found.shape == (16, 24, 2)
    assert found[hidden].isnan().all()
    torch.testing.assert_close(found[~hidden], dense[~hidden])


@pytest.mark.parametrize('channels', [1, 8, 11, 70])
def test_grid(channels):
    """Each cell has the colours of its own channel, on one scale for all."""
    signs = torch.randint(-1, 2, (3, 30, channels)).float()
    signs[0] = 1
    page = channel_grid(5 * signs)
    shown = min(channels, 64)
    rows, columns = -(-shown // 8), min(shown, 8)
    # Enlarged twice.
    assert page.shape == (rows * (6 + 2) + 2, columns * (60 + 2) + 2, 3)
    for channel in range(shown):
        top, left = 2 + channel // 8 * 8, 2 + channel % 8 * 62
        cell = page[top : top + 6, left : left + 60][::2, ::2]
        values = signs[..., channel].numpy()
        assert (cell[values == 1] == RED).all()
        assert (cell[values == -1] == BLUE).all()
        assert (cell[values == 0] > 240).all()
    assert not page[:2].any()
    assert not page[:, -2:].any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dead_looks_dead_and_hidden_is_grey(dtype):
    maps = torch.zeros(56, 56, 3)
    maps[..., 0] = 1
    maps[..., 1] = 1e-3
    maps[:10] = math.nan
    page = channel_grid(maps.to(dtype))
    cells = [page[2:-2, 2 + 58 * i : 58 * (i + 1)] for i in range(3)]
    for cell in cells:
        assert (cell[:10] == GREY).all()
    assert (cells[0][10:] == RED).all()
    assert (cells[1][10:] > 240).all()
    assert (cells[2][10:] > 240).all()


def test_nothing_but_zeros_and_a_single_peak():
    assert (channel_grid(torch.zeros(56, 56, 1))[2:-2, 2:-2] > 240).all()
    peak = torch.zeros(56, 56, 1)
    peak[3, 4] = -7
    page = channel_grid(peak)[2:-2, 2:-2]
    assert tuple(page[3, 4]) == BLUE
    assert (page[4:] > 240).all()
