"""The kernels for tiles against sums over shifted pictures, in float64."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.nn.functional import pad

from mmcnv2.models.depthwise import convolve_tiles, is_quicker_by_tiles
from mmcnv2.models.layouts import DenseLayout, PackedLayout
from mmcnv2.models.tiles import Tiles

# Whole tiles, and cut ones; less than a tile; more tiles than are summed in one go.
SIZES = [(2, 16, 24), (3, 9, 17), (1, 7, 7), (2, 1, 3), (1, 65, 70)]
# The last one has channels left over by whatever is computed at a time.
CHANNELS = [8, 64, 40]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def shifted_products(x, weight, bias, grad):
    """Return output and gradients for ``(N, H, W, C)``, each a sum as it is defined."""
    height, width = x.shape[1:3]
    padded = pad(x, [0, 0, 3, 3, 3, 3])
    out = bias.expand_as(x).clone()
    grad_x, grad_weight = torch.zeros_like(padded), torch.zeros_like(weight)
    for i in range(7):
        for j in range(7):
            window = (slice(None), slice(i, i + height), slice(j, j + width))
            out += weight[:, 0, i, j] * padded[window]
            grad_x[window] += weight[:, 0, i, j] * grad
            grad_weight[:, 0, i, j] = (padded[window] * grad).sum((0, 1, 2))
    inner = grad_x[:, 3:-3, 3:-3]
    return out, inner, grad_weight, grad.sum((0, 1, 2))


def draw(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def convolution(channels, dtype=torch.float32):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
    return conv.to(dtype)


def results(conv, x, grad, tiles):
    x = x.clone().requires_grad_()
    assert is_quicker_by_tiles(conv, x)
    out = convolve_tiles(conv, x, tiles)
    return out, *torch.autograd.grad(out, (x, conv.weight, conv.bias), grad)


def assert_close(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        apart = (one.double() - other).abs().max()
        assert apart <= TOLERANCE[dtype] * other.abs().max()


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_pictures(size, channels, dtype):
    conv = convolution(channels, dtype)
    x, grad = (draw(*size, channels, dtype=dtype) for _ in range(2))
    grad = grad.flip(0, 1)
    found = results(conv, x, grad, Tiles.of_pictures(*size))
    tensors = (x, conv.weight.detach(), conv.bias.detach(), grad)
    assert_close(found, shifted_products(*(t.double() for t in tensors)), dtype)


def visible_tokens(x, visible, side):
    """Return the tokens of ``(N, H, W, C)``, one patch after the other."""
    patches = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return patches[visible].view(len(x), -1, x.shape[-1])


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('side', [8, 4, 2, 1])
def test_patches(side, channels, dtype):
    conv = convolution(channels, dtype)
    # 24 of 40 are hidden, in each picture others.
    order = torch.rand(3, 40, generator=torch.Generator().manual_seed(side)).argsort(1)
    visible = (order >= 24).view(3, 5, 8)
    size = (3, 5 * side, 8 * side)
    seen = visible.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]
    x, grad = (draw(*size, channels, dtype=dtype) * seen for _ in range(2))
    grad = grad.flip(3)

    tokens = [visible_tokens(each, visible, side) for each in (x, grad)]
    patches = visible.flatten().nonzero()[:, 0]
    found = results(conv, *tokens, Tiles.of_patches(visible.shape, patches, side))
    tensors = (x, conv.weight.detach(), conv.bias.detach(), grad)
    out, grad_x, *others = shifted_products(*(t.double() for t in tensors))
    expected = [visible_tokens(each, visible, side) for each in (out, grad_x)]
    assert_close(found, (*expected, *others), dtype)


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_threads_change_nothing(size):
    conv, tiles = convolution(24), Tiles.of_pictures(*size)
    x, grad = draw(*size, 24), draw(*size, 24).flip(0)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(results(conv, x, grad, tiles))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_memory_in_any_order():
    conv, tiles = convolution(16), Tiles.of_pictures(2, 9, 10)
    x = draw(2, 16, 9, 10).permute(0, 2, 3, 1)
    # A sum's gradient is one number, repeated without memory of its own.
    grad = torch.ones(()).expand_as(x)
    found = results(conv, x, grad, tiles)
    expected = results(conv, x.contiguous(), grad.contiguous(), tiles)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_parameters_in_any_order_of_memory():
    conv, tiles = convolution(16), Tiles.of_pictures(2, 9, 10)
    x, grad = draw(2, 9, 10, 16), draw(2, 9, 10, 16)
    expected = results(conv, x, grad, tiles)
    for parameter in conv.parameters():
        parameter.data = torch.stack((parameter.data, parameter.data), -1)[..., 0]
    assert not conv.bias.is_contiguous()
    for one, other in zip(results(conv, x, grad, tiles), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('packed', [False, True])
def test_operators_are_what_they_tell_compilers(packed, dtype):
    x, tiles = draw(2, 9, 10, 16, dtype=dtype), ([], [])
    if packed:
        visible = Tiles.of_patches(torch.Size((2, 2, 2)), torch.tensor([1, 2, 4, 7]), 4)
        x = draw(2, 32, 16, dtype=dtype)
        tiles = [visible.near, visible.origin], [visible.side, visible.row]
    ours, taps, bias = torch.ops.mmcnv2, draw(49, 16), draw(16)
    # In another order of memory, too.
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (x, turned):
        opcheck(ours.convolve.default, (given, taps, bias, *tiles, True))
        opcheck(ours.convolve.default, (given, taps, None, *tiles, False))
        opcheck(ours.sum_gradients.default, (x.flip(0), given, *tiles))
    one, other = (ours.convolve(each, taps, bias, *tiles, True) for each in (x, turned))
    assert torch.equal(one, other)


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_tiles_that_are_given_to_compilers(size, to_one_graph):
    conv, tiles, x = convolution(16), Tiles.of_pictures(*size), draw(*size, 16)
    compiled = to_one_graph(convolve_tiles, backend='aot_eager', dynamic=False)
    outs = [run(conv, x, tiles) for run in (compiled, convolve_tiles)]
    assert torch.equal(*outs)
    assert torch.equal(compiled(conv, x, None), outs[1])


@pytest.mark.parametrize('wanted', ['x', 'weight', 'bias'])
def test_nothing_else_is_given_a_gradient(wanted):
    conv, x = convolution(8), draw(2, 8, 8, 8)
    tensors = dict(x=x, weight=conv.weight, bias=conv.bias)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    convolve_tiles(conv, x, Tiles.of_pictures(2, 8, 8)).square().sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [wanted]


def test_autocast_is_at_least_as_exact_as_that_of_an_ordinary_convolution():
    conv, x = convolution(8), draw(2, 9, 9, 8)

    def ordinary(conv, x):
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def with_gradients(out, conv):
        loss = out.to(torch.promote_types(out.dtype, torch.float32)).square().sum()
        return out, *torch.autograd.grad(loss, tuple(conv.parameters()))

    with torch.autocast('cpu', torch.bfloat16):
        outs = convolve_tiles(conv, x, Tiles.of_pictures(2, 9, 9)), ordinary(conv, x)
    found, usual = (with_gradients(out, conv) for out in outs)
    double = deepcopy(conv).double()
    exact = with_gradients(ordinary(double, x.double()), double)
    assert [each.dtype for each in found] == [torch.bfloat16, *[torch.float32] * 2]
    for one, usually, other in zip(found, usual, exact, strict=True):
        assert one.dtype == usually.dtype
        apart, least = ((each - other).abs() for each in (one, usually))
        assert apart.max() <= least.max()
        assert apart.mean() <= least.mean()


def test_rounding_to_bfloat16_is_torchs_own():
    # Products with powers of two: exact before they are rounded. Half of the numbers
    # lie halfway between two of bfloat16.
    numbers = 1 + torch.arange(-64, 64) / 256
    special = torch.tensor([float('inf'), -float('inf'), float('nan'), 3.4e38])
    x = torch.cat([numbers, special]).view(-1, 1, 1, 1).expand(-1, 1, 1, 8)
    top = x.bfloat16()
    rest = (x - top.float()).nan_to_num(0, 0, 0).bfloat16()
    conv = convolution(8, torch.bfloat16)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    conv.weight.data[:, 0, 3, 3:5] = 1
    pairs = torch.cat([top, rest], dim=2)
    out = convolve_tiles(conv, pairs, Tiles.of_pictures(*pairs.shape[:3]))
    expected = (top.float() + rest.float()).bfloat16()
    torch.testing.assert_close(out[:, :, :1], expected, rtol=0, atol=0, equal_nan=True)


def test_what_it_is_for():
    conv, x = convolution(16), draw(1, 8, 8, 16)
    assert is_quicker_by_tiles(conv, x)
    assert not is_quicker_by_tiles(convolution(12), draw(1, 8, 8, 12))
    assert not is_quicker_by_tiles(conv.double(), x.double())
    conv = convolution(16)
    assert not is_quicker_by_tiles(conv, x.to('meta'))
    assert not is_quicker_by_tiles(convolution(16).to('meta'), x)
    with torch.autocast('cpu', torch.float16):
        assert not is_quicker_by_tiles(conv, x)
    conv.register_forward_hook(lambda *args: None)
    assert not is_quicker_by_tiles(conv, x)


class Another(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ('changes', 'kind'),
    [
        (dict(kernel_size=3, padding=1), nn.Conv2d),
        (dict(padding=9, dilation=3), nn.Conv2d),
        (dict(padding_mode='circular'), nn.Conv2d),
        (dict(bias=False), nn.Conv2d),
        (dict(groups=4), nn.Conv2d),
        (dict(), Another),
    ],
    ids=str,
)
def test_what_is_put_in_its_place_is_run(changes, kind):
    kwargs = dict(kernel_size=7, padding=3, groups=16) | changes
    conv = kind(16, 16, **kwargs)
    x = draw(1, 8, 8, 16)
    assert not is_quicker_by_tiles(conv, x)
    expected = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.equal(DenseLayout().depthwise(conv, x), expected)
    packed = PackedLayout(torch.zeros(1, 1, 1, dtype=torch.bool), num_visible=1)
    tokens = packed.depthwise(conv, x.flatten(1, 2))
    torch.testing.assert_close(tokens.view_as(x), expected)


def test_tables_are_on_the_cpu_wherever_tensors_are_made():
    conv, x = convolution(16), draw(2, 8, 16, 16)
    mask = torch.tensor([[[True, False]], [[False, True]]])
    with torch.device('meta'):
        for layout, features in (
            (DenseLayout(), x),
            (PackedLayout(mask, num_visible=1), x[:, :, :8].flatten(1, 2)),
        ):
            assert layout.depthwise(conv, features).isfinite().all()
