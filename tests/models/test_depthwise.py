"""The gradients against products of shifted pictures, in float64."""

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from mmcnv2.models.depthwise import DepthwiseConv2d

# The last one is cut into parts, of which the smallest is narrower than the kernel.
SIZES = [(1, 4, 7, 7), (3, 5, 1, 2), (2, 6, 9, 17), (2, 3, 66, 131)]
TOLERANCE = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.bfloat16: dict(rtol=2e-2, atol=2e-2),
}


def shifted_products(x, grad, weight):
    """Return the gradients of input, weight and bias, each a sum as it is defined."""
    x, grad, weight = (tensor.double() for tensor in (x, grad, weight))
    height, width = x.shape[2:]
    margin = weight.shape[-1] // 2
    grad_x = pad(torch.zeros_like(x), [margin] * 4)
    grad_weight = torch.zeros_like(weight)
    padded = pad(x, [margin] * 4)
    for i in range(weight.shape[-1]):
        for j in range(weight.shape[-1]):
            window = (..., slice(i, i + height), slice(j, j + width))
            grad_weight[:, 0, i, j] = (padded[window] * grad).sum((0, 2, 3))
            grad_x[window] += weight[:, 0, i, j, None, None] * grad
    inner = (..., slice(margin, -margin), slice(margin, -margin))
    return grad_x[inner], grad_weight, grad.sum((0, 2, 3))


def random(shape, dtype, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator).to(dtype)
    return values.to(memory_format=memory_format)


def assert_close(found, expected, **tolerance):
    scale = expected.abs().max()
    torch.testing.assert_close(found.double() / scale, expected / scale, **tolerance)


@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('kernel_size', [3, 7])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_gradients(size, kernel_size, dtype, memory):
    conv = DepthwiseConv2d(size[1], kernel_size).to(dtype)
    x = random(size, dtype, memory).requires_grad_()
    grad = random(size, dtype, memory).flip(0)
    out = conv(x)
    plain = nn.functional.conv2d(
        x, *conv.parameters(), padding=kernel_size // 2, groups=size[1]
    )
    assert torch.equal(out, plain)
    inputs = (x, conv.weight, conv.bias)
    found = torch.autograd.grad(out, inputs, grad)
    expected = shifted_products(x.detach(), grad, conv.weight.detach())
    for one, other, tensor in zip(found, expected, inputs, strict=True):
        assert one.shape == tensor.shape
        assert one.dtype == dtype
        assert_close(one, other, **TOLERANCE[dtype])


@pytest.mark.parametrize('wanted', ['x', 'weight', 'bias'])
def test_nothing_else_is_computed(wanted):
    conv = DepthwiseConv2d(3)
    x = random((2, 3, 8, 8), torch.float32)
    tensors = dict(x=x, weight=conv.weight, bias=conv.bias)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    conv(x).square().sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [wanted]


def test_autocast_is_that_of_an_ordinary_convolution():
    conv = DepthwiseConv2d(3)
    plain = nn.Conv2d(3, 3, 7, padding=3, groups=3)
    plain.load_state_dict(conv.state_dict())
    x = random((2, 3, 9, 9), torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        outs = [module(x) for module in (conv, plain)]
    assert outs[0].dtype == torch.bfloat16
    assert torch.equal(*outs)
    for out in outs:
        out.float().square().sum().backward()
    for one, other in zip(conv.parameters(), plain.parameters(), strict=True):
        assert one.grad.dtype == torch.float32
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-2, atol=2e-2)
