import pytest
import torch

from mmcnv2.models.grn import GRN, normalise


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


def test_second_derivatives():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    gamma, beta = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64)
    inputs = x, gamma.requires_grad_(), beta.requires_grad_()
    assert torch.autograd.gradgradcheck(normalise, inputs)


def test_compiles_for_sizes_that_are_not_known(to_one_graph):
    """Positions stay as they are: compilers make slow loops of flattened ones."""
    torch.manual_seed(0)
    grn = GRN(6)
    torch.nn.init.normal_(grn.gamma)
    torch.nn.init.normal_(grn.beta)
    compiled = to_one_graph(grn, dynamic=True, backend='aot_eager')
    for stance, shape in [
        ('default', (2, 5, 7, 6)),
        ('fail_on_recompile', (3, 4, 8, 6)),
    ]:
        x = torch.randn(shape, requires_grad=True)
        found = []
        with torch.compiler.set_stance(stance):
            for run in (compiled, grn):
                out = run(x)
                inputs = (x, grn.gamma, grn.beta)
                found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        for value, expected in zip(*found, strict=True):
            torch.testing.assert_close(value, expected)
