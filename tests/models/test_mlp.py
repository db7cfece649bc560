"""The layers of a block as one function, against the layers one after the other."""

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mmcnv2.models import kernels, mlp, mlp_by_parts
from mmcnv2.models.grn import GRN
from mmcnv2.models.layers import Block
from mmcnv2.models.layouts import DenseLayout

# Features, and the number of expanded channels: one group of pictures, two unequal
# ones, and a group for each picture, of two unequal parts.
SHAPES = [
    ((5, 3, 7, 6), 24),
    ((1, 1, 1, 2), 8),
    ((3, 80, 120, 8), 200),
    ((2, 3, 5, 1601, 6), 200),
]


def plain(x, pwconv1, grn, pwconv2):
    """What it is, by autograd alone; GRN as in algorithm 1."""
    y = nn.functional.gelu(pwconv1(x))
    positions = tuple(range(1, y.dim() - 1))
    # The root has no slope where a channel is nowhere active, but the norm has: 0.
    squares = y.square().sum(positions, keepdim=True)
    norm = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
    relative = norm / (norm.mean(-1, keepdim=True) + 1e-6)
    return pwconv2(grn.gamma * (y * relative) + grn.beta + y)


def layers(dim, hidden, dtype):
    made = nn.Linear(dim, hidden), GRN(hidden), nn.Linear(hidden, dim)
    for layer in made:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        # A channel that is nowhere active.
        made[0].weight[0], made[0].bias[0] = 0, -40
    return [layer.to(dtype) for layer in made]


@pytest.mark.parametrize(
    ('dtype', 'few_threads'),
    [(torch.float64, 8), (torch.float32, 8), (torch.float32, 0)],
    ids=str,
)
@pytest.mark.parametrize(('shape', 'hidden'), SHAPES, ids=str)
def test_is_one_after_the_other(shape, hidden, dtype, few_threads, monkeypatch):
    # With more than a few, libraries multiply, between kernels of our own.
    monkeypatch.setattr(kernels, '_FEW_THREADS', few_threads)
    torch.manual_seed(0)
    made = layers(shape[-1], hidden, dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    out, expected = mlp.expand_and_project(x, *made), plain(x, *made)
    inputs = [x, *(p for layer in made for p in layer.parameters())]
    direction = torch.randn_like(out)
    close = 1e-11 if dtype == torch.float64 else 1e-5
    grads = torch.autograd.grad(out, inputs, direction)
    expected_grads = torch.autograd.grad(expected, inputs, direction)
    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
    for found, other in pairs:
        assert other.isfinite().all()
        assert (found - other).abs().max() <= close * other.abs().max()
    with torch.no_grad():
        torch.testing.assert_close(mlp.expand_and_project(x, *made), out)


@pytest.mark.parametrize('few_threads', [8, 0])
@pytest.mark.parametrize(('shape', 'hidden'), SHAPES, ids=str)
def test_compiles_as_it_is(shape, hidden, few_threads, monkeypatch, to_one_graph):
    """What is kept of all groups and parts is one tensor then."""
    monkeypatch.setattr(kernels, '_FEW_THREADS', few_threads)
    torch.manual_seed(0)
    made = layers(shape[-1], hidden, torch.float32)
    x = torch.randn(shape, requires_grad=True)
    inputs = [x, *(p for layer in made for p in layer.parameters())]
    runs = (
        mlp.expand_and_project,
        to_one_graph(mlp.expand_and_project, dynamic=False, backend='aot_eager'),
    )
    outs = [run(x, *made) for run in runs]
    direction = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(out, inputs, direction) for out in outs]
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=0)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_operators_are_what_they_tell_compilers(dtype):
    made, x = layers(8, 24, dtype), torch.randn(3, 10, 8, dtype=dtype)
    parameters = [p.detach() for layer in made for p in layer.parameters()]
    opcheck(mlp_by_parts.forward_operator, ([x, *parameters], False))
    if dtype == torch.bfloat16:
        return
    opcheck(mlp_by_parts.forward_operator, ([x, *parameters], True))
    out, *kept = mlp_by_parts.forward_operator([x, *parameters], True)
    opcheck(mlp_by_parts.backward_operator, (out, [x, *parameters, *kept]))


@pytest.mark.parametrize(('shape', 'hidden'), SHAPES, ids=str)
def test_operators_take_pieces_too(shape, hidden):
    """Where the way back alone is compiled, what was kept is of the layers' own way."""
    torch.manual_seed(0)
    parameters = [
        p
        for layer in layers(shape[-1], hidden, torch.float32)
        for p in layer.parameters()
    ]
    with torch.no_grad():
        inputs = [torch.randn(shape).flatten(1, -2), *parameters]
        (out, *pieces), (_, *whole) = (
            mlp_by_parts.forward(*inputs, keep=True),
            mlp_by_parts.forward_operator(inputs, True),
        )
        expected = mlp_by_parts.backward(out, *inputs, *pieces)
        for kept in (pieces, whole):
            found = mlp_by_parts.backward_operator(out, [*inputs, *kept])
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_shapes_are_divided_as_they_are_meant_to_be():
    features = [torch.empty(shape).flatten(1, -2) for shape, _ in SHAPES]
    wide = [hidden for _, hidden in SHAPES]
    divided = [mlp_by_parts._divide(*each) for each in zip(features, wide, strict=True)]
    counts = [(len(groups), len(parts)) for groups, parts in divided]
    assert counts == [(1, 1), (1, 1), (2, 1), (2, 2)]
    together, alone = (groups for groups, _ in divided[2:])
    assert together == [slice(0, 2), slice(2, 3)]
    assert alone == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize('shape', [(1, 16, 5, 7), (3, 16, 5, 7), (2, 8, 120, 80)])
def test_of_pictures_whose_channels_are_not_last_in_memory(shape):
    torch.manual_seed(0)
    made = layers(shape[1], 200, torch.float32)
    x = torch.randn(shape).permute(0, 2, 3, 1).requires_grad_()
    out, expected = mlp.expand_and_project(x, *made), plain(x, *made)
    direction = torch.randn(shape).permute(0, 2, 3, 1)
    grad, expected_grad = (
        torch.autograd.grad(each, x, direction)[0] for each in (out, expected)
    )
    for found, other in ((out, expected), (grad, expected_grad)):
        assert (found - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(('shape', 'hidden'), SHAPES, ids=str)
def test_bfloat16_is_as_exact_as_one_after_the_other(shape, hidden):
    torch.manual_seed(0)
    made = layers(shape[-1], hidden, torch.float32)
    x = torch.randn(shape)
    with torch.no_grad():
        exact = plain(x, *made)
        with torch.autocast('cpu'):
            found = mlp.expand_and_project(x, *made)
            pwconv1, grn, pwconv2 = made
            other = pwconv2(grn(nn.functional.gelu(pwconv1(x))))
    assert found.dtype == other.dtype == torch.bfloat16
    apart, usual = ((each - exact).abs() for each in (found, other))
    assert apart.max() <= 1.25 * usual.max()
    assert apart.mean() <= 1.25 * usual.mean()


def test_kinds_that_it_is_for():
    x, block = torch.zeros(1, 8, 8, 16), Block(16)

    def fits(x):
        modules = block.pwconv1, block.act, block.grn, block.pwconv2
        return mlp.is_quicker_by_parts(x, *modules)

    assert fits(x)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            assert fits(x.bfloat16()) != training
            assert not fits(x.half())
            with torch.autocast('cpu'):
                assert fits(x) != training
                # Which autocast leaves alone.
                assert fits(x.double())


@pytest.mark.parametrize('name', ['pwconv1', 'act', 'grn', 'pwconv2'])
@pytest.mark.parametrize(
    'hook',
    [
        'register_forward_hook',
        'register_forward_pre_hook',
        'register_full_backward_hook',
        'register_full_backward_pre_hook',
    ],
)
def test_whoever_looks_inside_sees_all(name, hook):
    block, x = Block(16), torch.randn(1, 8, 8, 16, requires_grad=True)
    expected = block(x, DenseLayout())
    seen = []
    getattr(getattr(block, name), hook)(lambda *args: seen.append(args))
    out = block(x, DenseLayout())
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert len(seen) == 1


def test_what_is_put_in_the_place_of_a_layer_is_run():
    block, x = Block(16), torch.randn(1, 8, 8, 16)
    block.act = nn.ReLU()
    x = DenseLayout().depthwise(block.dwconv, x)
    y = block.norm(x)
    expected = block.pwconv2(block.grn(block.pwconv1(y).relu()))
    torch.testing.assert_close(block.mlp(x), expected)
    block.act, block.pwconv1 = nn.GELU(), nn.Linear(16, 64, bias=False)
    expected = block.pwconv2(block.grn(nn.functional.gelu(block.pwconv1(y))))
    torch.testing.assert_close(block.mlp(x), expected)
    block = Block(16)
    block.act = nn.GELU('tanh')
    wide = nn.functional.gelu(block.pwconv1(y), approximate='tanh')
    torch.testing.assert_close(block.mlp(x), block.pwconv2(block.grn(wide)))


class Halved(torch.Tensor):
    """What linear layers see half as large, as they see quantised weights."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, bias = args
            with torch._C.DisableTorchFunctionSubclass():
                return func(x, weight.as_subclass(torch.Tensor) / 2, bias)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize('name', ['pwconv1', 'grn', 'pwconv2'])
def test_layers_that_were_changed_in_place_are_run(name):
    x = torch.randn(1, 8, 8, 16)
    block = Block(16)
    layer = getattr(block, name)
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)
    expected = block.pwconv2(block.grn(block.act(block.pwconv1(block.norm(x)))))
    torch.testing.assert_close(block.mlp(x), expected)


def test_weights_of_other_kinds_are_asked_themselves():
    x, block = torch.randn(1, 8, 8, 16), Block(16)
    weight = block.pwconv1.weight.data
    wide = nn.functional.linear(block.norm(x), weight / 2, block.pwconv1.bias)
    halved = weight.as_subclass(Halved)
    block.pwconv1.weight = nn.Parameter(halved, requires_grad=False)
    assert type(block.pwconv1.weight) is Halved
    expected = block.pwconv2(block.grn(nn.functional.gelu(wide)))
    torch.testing.assert_close(block.mlp(x), expected)


def test_parameters_in_any_order_of_memory():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    made = layers(8, 32, torch.float32)
    for parameter in (p for layer in made for p in layer.parameters()):
        parameter.data = torch.stack((parameter.data, parameter.data), -1)[..., 0]
        assert not parameter.is_contiguous()
    out, expected = mlp.expand_and_project(x, *made), plain(x, *made)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    inputs = [x, *(p for layer in made for p in layer.parameters())]
    grads = torch.autograd.grad(out.sum(), inputs)
    others = torch.autograd.grad(expected.sum(), inputs)
    for found, other in zip(grads, others, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
def test_second_derivatives(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=dtype, requires_grad=True)
    made = layers(8, 32, dtype)
    nn.init.normal_(made[0].weight)
    inputs = [x, *(p for layer in made for p in layer.parameters())]

    def second(function):
        # By way of a sum as well, as in a block, by which some of it would come anyway.
        out = (x + function(x, *made)).square().sum()
        grads = torch.autograd.grad(out, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    close = 1e-10 if dtype == torch.float64 else 1e-4
    pairs = zip(second(mlp.expand_and_project), second(plain), strict=True)
    for found, other in pairs:
        assert (found - other).abs().max() <= close * other.abs().max()


def test_an_empty_batch():
    x = torch.zeros(0, 3, 5, 8, requires_grad=True)
    block = Block(8)
    out = block(x, DenseLayout())
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape


def test_operations_are_counted():
    block, y = Block(16), torch.randn(1, 8, 8, 16)
    with FlopCounterMode(display=False) as counter:
        block.mlp(y)
    assert counter.get_total_flops() == 2 * 2 * 64 * 16 * 64


@pytest.mark.parametrize(
    'frozen', [('pwconv1',), ('pwconv1', 'grn', 'pwconv2')], ids=str
)
@pytest.mark.parametrize('pictures', [1, 2])
def test_frozen_layers(frozen, pictures):
    torch.manual_seed(0)
    block, y = Block(16), torch.randn(pictures, 8, 8, 16, requires_grad=True)
    for name in frozen:
        getattr(block, name).requires_grad_(False)
    learning = [
        p for name, p in block.named_parameters() if 'pw' in name or 'grn' in name
    ]
    inputs = [y, *(p for p in learning if p.requires_grad)]
    # A sum's gradient is one number, repeated without memory of its own.
    found = torch.autograd.grad(block.mlp(y).sum(), inputs)
    made = block.pwconv1, block.grn, block.pwconv2
    expected = torch.autograd.grad(plain(block.norm(y), *made).sum(), inputs)
    for grad, other in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_one_wide_tensor_is_kept():
    block, kept = Block(16), []
    x = torch.randn(1, 16, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        block(x, DenseLayout())
    assert sum(shape.numel() == 4 * x.numel() for shape in kept) == 1


@pytest.mark.parametrize(
    ('name', 'layer'),
    [
        ('pwconv1', nn.Linear(16, 32)),
        ('pwconv1', nn.Linear(8, 24)),
        ('grn', GRN(24)),
        ('grn', GRN(40)),
        ('pwconv2', nn.Linear(24, 8)),
        ('pwconv2', nn.Linear(32, 16)),
    ],
    ids=str,
)
def test_layers_that_do_not_fit_are_an_error(name, layer):
    """Kernels would read and write past the ends."""
    block, x = Block(8), torch.randn(2, 3, 4, 8)
    setattr(block, name, layer)
    with pytest.raises(RuntimeError, match=r'shape|size'):
        block(x, DenseLayout())


@pytest.mark.parametrize('name', ['pwconv1.bias', 'pwconv2.bias', 'grn.beta'])
def test_parameters_that_do_not_fit_are_an_error(name):
    block, x = Block(8), torch.randn(2, 3, 4, 8)
    block.get_parameter(name).data = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r'shape|size'):
        block(x, DenseLayout())


def test_layers_may_be_pruned():
    block, x = Block(8), torch.randn(2, 3, 4, 8)
    block.pwconv1, block.grn, block.pwconv2 = layers(8, 24, torch.float32)
    y = block.norm(x)
    torch.testing.assert_close(
        block.mlp(x), plain(y, block.pwconv1, block.grn, block.pwconv2)
    )
