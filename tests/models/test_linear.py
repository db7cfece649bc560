import pytest
import torch

from mmcnv2.models import kernels
from mmcnv2.models.linear import add_product, linear

# Rows, depth and columns of products: less than a tile of the kernel, odd ones, a tile
# and one more, more than any of its blocks.
SIZES = [
    (1, 1, 1),
    (5, 7, 15),
    (6, 8, 16),
    (7, 9, 17),
    (97, 385, 33),
    (200, 24, 1041),
    (12, 1000, 40),
]


# For the last number of threads libraries multiply, not we.
THREADS = 1, 2, 3, 4, 9


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize('biased', [False, True])
def test_of_any_size(size, turned, biased, set_threads):
    torch.manual_seed(0)
    rows, depth, columns = size
    x, bias = torch.randn(rows, depth), torch.randn(columns) if biased else None
    weight = torch.randn(depth, columns).t() if turned else torch.randn(columns, depth)
    expected = (x.double()[:, None] * weight.double()).sum(-1)
    expected += 0 if bias is None else bias.double()
    for threads in THREADS:
        set_threads(threads)
        out = torch.full((rows, columns), torch.nan)
        assert linear(x, weight, bias, out=out) is out
        torch.testing.assert_close(out, expected.float(), atol=1e-4, rtol=1e-4)
        assert torch.equal(linear(x, weight, bias), out)


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('strided', ['no', 'channels', 'rows', 'expanded'])
def test_gradient_of_weights(size, strided, set_threads):
    torch.manual_seed(0)
    columns, rows, inputs = size
    left, right = torch.randn(rows, columns), torch.randn(rows, inputs)
    if strided == 'channels':
        left = torch.randn(rows, 2 * columns)[:, ::2]
    elif strided == 'rows':
        left, right = torch.randn(columns, rows).t(), torch.randn(inputs, rows).t()
    elif strided == 'expanded':
        left = torch.randn(columns).expand(rows, columns)
    expected = (left.double()[..., None] * right.double()[:, None]).sum(0)
    for threads in THREADS:
        set_threads(threads)
        sums = torch.full((columns, inputs), torch.nan)
        add_product(sums, left, right, begun=False)
        torch.testing.assert_close(sums, expected.float(), atol=1e-4, rtol=1e-4)
        add_product(sums, left, right, begun=True)
        torch.testing.assert_close(sums, 2 * expected.float(), atol=2e-4, rtol=1e-4)


def test_does_not_depend_on_threads(set_threads):
    if not kernels.fit_products(torch.ones(1)):
        pytest.skip('libraries multiply here')
    torch.manual_seed(0)
    x, weight, found = torch.randn(200, 500), torch.randn(90, 500), []
    for threads in (1, 2, 3, 8):
        set_threads(threads)
        found.append(linear(x, weight))
    assert all(torch.equal(each, found[0]) for each in found)


def test_others_are_left_to_libraries():
    one = torch.ones(2, 2)
    assert not kernels.fit_products(one.double(), one.double())
    assert not kernels.fit_products(one.bfloat16())
    assert not kernels.fit_products(one.to('meta'))


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
