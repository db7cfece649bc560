import pytest
import torch
from torch import nn

from mmcnv2.models.grn import GRN, activate_and_project, is_quicker_folded
from mmcnv2.models.layers import Block
from mmcnv2.models.layouts import DenseLayout


def reference_grn(x, gamma, beta):
    """GRN as the paper's algorithm 1 has it, one picture and channel at a time."""
    out = torch.empty_like(x)
    for n in range(x.shape[0]):
        norms = [x[n, ..., c].square().sum().sqrt() for c in range(x.shape[-1])]
        mean = sum(norms) / len(norms)
        for c, norm in enumerate(norms):
            response = x[n, ..., c] * norm / (mean + 1e-6)
            out[n, ..., c] = gamma[c] * response + beta[c] + x[n, ..., c]
    return out


@pytest.mark.parametrize('shape', [(2, 5, 3, 7), (3, 11, 4), (1, 1, 1, 2)], ids=str)
def test_grn_is_the_papers(shape):
    torch.manual_seed(0)
    grn = GRN(shape[-1]).double()
    gamma, beta = (torch.randn(shape[-1]).double().requires_grad_() for _ in range(2))
    with torch.no_grad():
        grn.gamma.copy_(gamma)
        grn.beta.copy_(beta)
    x = torch.randn(shape).double().requires_grad_()
    y = x.detach().clone().requires_grad_()
    weight = torch.randn(shape).double()

    out, expected = grn(x), reference_grn(y, gamma, beta)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()

    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(grn.gamma.grad.flatten(), gamma.grad)
    torch.testing.assert_close(grn.beta.grad.flatten(), beta.grad)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_grn_does_not_overflow_in_16_bits(dtype):
    # The squares sum to 6e14: far beyond float16, where even one of them is.
    grn = GRN(2)
    with torch.no_grad():
        grn.gamma.copy_(torch.tensor([0.5, -0.5]))
    x = torch.randn(1, 1024, 1024, 2) * torch.tensor([20000.0, 10.0]) / 3
    x = x.to(dtype).requires_grad_()
    out = grn(x)
    out.float().sum().backward()
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    exact = x.detach().float().requires_grad_()
    expected = grn(exact)
    expected.sum().backward()
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(x.grad.float(), exact.grad, rtol=2e-2, atol=1e-2)


def test_grn_of_nothing_is_nothing():
    x = torch.zeros(1, 4, 4, 3, requires_grad=True)
    GRN(3)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ('dtype', 'tolerance'),
    [(torch.float64, dict(rtol=1e-11, atol=1e-11)), (torch.float32, dict())],
    ids=str,
)
@pytest.mark.parametrize('shape', [(2, 5, 3, 7), (3, 11, 4), (1, 1, 1, 2)], ids=str)
def test_folded_is_one_after_the_other(shape, dtype, tolerance):
    torch.manual_seed(0)
    grn, linear = GRN(shape[-1]).to(dtype), nn.Linear(shape[-1], 3).to(dtype)
    parameters = [*grn.parameters(), *linear.parameters()]
    for parameter in parameters:
        nn.init.normal_(parameter)
    x = torch.randn(shape, dtype=dtype)
    # A channel that is nowhere active has no norm to go through.
    x[..., 0] = -40.0
    x.requires_grad_()
    expected = linear(grn(nn.functional.gelu(x)))
    out = activate_and_project(x, grn, linear)
    torch.testing.assert_close(out, expected, **tolerance)
    direction = torch.randn_like(out)
    inputs = (x, *parameters)
    grads = torch.autograd.grad(out, inputs, direction)
    expected_grads = torch.autograd.grad(expected, inputs, direction)
    for grad, other in zip(grads, expected_grads, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(grad, other, **tolerance)


def test_folds_where_it_is_quick_and_nobody_looks_inside():
    wide, narrow = torch.zeros(1, 8, 8, 64), torch.zeros(1, 4, 4, 64)
    assert is_quicker_folded(wide)
    assert not is_quicker_folded(narrow)
    assert not is_quicker_folded(wide.to(torch.bfloat16))

    block, x = Block(16), torch.randn(1, 8, 8, 16)
    expected = block(x, DenseLayout())
    seen = []
    block.act.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(block(x, DenseLayout()), expected)
    assert seen[0].shape == (1, 8, 8, 64)


def test_folded_keeps_its_input_alone():
    block, kept = Block(16), []
    x = torch.randn(1, 16, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        block(x, DenseLayout())
    assert sum(shape.numel() == 4 * x.numel() for shape in kept) == 1
