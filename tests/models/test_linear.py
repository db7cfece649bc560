import pytest
import torch

from mmcnv2.models.linear import linear


@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str
)
@pytest.mark.parametrize('shape', [(1, 3), (7, 65), (3, 4, 33)], ids=str)
@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize('biased', [False, True])
def test_is_the_product(shape, turned, biased, dtype):
    torch.manual_seed(0)
    # A part of something, as the layers see it.
    x = torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., : shape[-1]]
    weight = torch.randn(shape[-1], 5) if turned else torch.randn(5, shape[-1])
    weight, bias = weight.to(dtype), torch.randn(5).to(dtype) if biased else None
    weight = weight.t() if turned else weight
    out = linear(x, weight, bias)
    expected = torch.einsum('...c,dc->...d', x.double(), weight.double())
    expected += 0 if bias is None else bias.double()
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype))


@pytest.mark.parametrize('turned', [False, True])
def test_of_a_large_weight(turned):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 513), torch.randn(513, 513)
    out = linear(x, weight.t() if turned else weight)
    product = 'npc,cd->npd' if turned else 'npc,dc->npd'
    expected = torch.einsum(product, x.double(), weight.double())
    torch.testing.assert_close(out, expected.float(), atol=1e-4, rtol=1e-4)
