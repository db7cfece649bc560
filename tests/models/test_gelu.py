"""GELU with what is around it, by kernels and by torch, against float64."""

import pytest
import torch
from torch.nn.functional import gelu

from mmcnv2.models import kernels
from mmcnv2.models.gelu import gelu_backward, gelu_products, gelu_squares
from mmcnv2.models.kernels import cpu

# Positions that are summed in one go and more, channels in one part of the stack and
# in several, and fewer than kernels take.
SHAPES = [(2, 5, 8), (1, 130, 24), (3, 64, 520), (1, 3, 1032), (2, 7, 6)]


@pytest.fixture(params=['kernels', 'torch'])
def means(request, monkeypatch):
    """What computes them."""
    assert kernels.are_compiled()
    if request.param == 'torch':
        monkeypatch.setattr(cpu, '_LIBRARY', None)


def draw(*shape, std=2.0):
    generator = torch.Generator().manual_seed(sum(shape))
    x = std * torch.randn(shape, generator=generator)
    x.flatten()[:5] = torch.tensor([0.0, -40.0, 40.0, -5.5, 1e-45])
    return x


def assert_close(found, expected):
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.usefixtures('means')
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('in_place', [False, True])
def test_squares(shape, in_place):
    x = draw(*shape)
    expected = gelu(x.double())
    before = x.clone()
    active, sums = gelu_squares(x, in_place=in_place)
    assert_close(active, expected)
    assert_close(sums, expected.square().sum(1, keepdim=True))
    assert (active is x) == in_place
    assert in_place or torch.equal(x, before)


@pytest.mark.usefixtures('means')
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('in_place', [False, True])
def test_squares_in_16_bits(shape, in_place):
    x = draw(*shape).bfloat16()
    expected = gelu(x.double())
    active, sums = gelu_squares(x, in_place=in_place)
    assert active.dtype == torch.bfloat16
    # Half of the last place, of eight; far below zero as exact as in 32 bits.
    assert ((active - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()
    squares = expected.square().sum(1, keepdim=True)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), squares, rtol=2**-7, atol=1e-6)
    # They are of GELU as it is rounded.
    assert_close(sums, active.double().square().sum(1, keepdim=True))
    assert (active is x) == in_place


@pytest.mark.usefixtures('means')
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_products(shape):
    x, grad = draw(*shape), draw(*shape).flip(2)
    sums = gelu_products(x, grad)
    grad = grad.double()
    assert_close(sums, torch.stack([(gelu(x.double()) * grad).sum(1), grad.sum(1)], 1))


@pytest.mark.usefixtures('means')
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_backward(shape):
    x, grad = draw(*shape), draw(*shape).flip(2)
    scale, slope = (draw(shape[0], 1, shape[2], std=s) for s in (1.0, 0.1))
    shift = draw(shape[2])
    tensor = x.double().requires_grad_()
    active = gelu(tensor)
    after = scale.double() * grad + slope.double() * active.detach()
    (before,) = torch.autograd.grad(active, tensor, after)

    out, sums = gelu_backward(x, scale, shift, slope, grad)
    assert_close(grad, before)
    assert_close(out, active.detach() * scale + shift)
    assert_close(sums, before.sum(1, keepdim=True))


def test_everywhere():
    """As exact as torch's own, and exactly zero where that is."""
    x = torch.linspace(-12, 12, 80_000).view(1, -1, 8)
    exact = gelu(x.double())
    ours, _ = gelu_squares(x)
    scale = x.abs().clamp(min=1)
    assert ((ours - exact) / scale).abs().max() < 2.5e-7
    assert (ours[gelu(x) == 0] == 0).all()


@pytest.mark.usefixtures('means')
def test_no_numbers():
    x = torch.tensor([float('nan'), float('inf')]).repeat(4).view(1, 1, 8)
    active, _ = gelu_squares(x)
    assert active.isnan().flatten().tolist() == [True, False] * 4
    assert active.isposinf().flatten().tolist() == [False, True] * 4


def test_threads_change_nothing():
    x, grad = draw(3, 70, 520), draw(3, 70, 520).flip(1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append((*gelu_squares(x), gelu_products(x, grad)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            assert torch.equal(one, another)
