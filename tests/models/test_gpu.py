"""Kernels for GPUs: on one, or else by Triton's interpreter, against float64."""

from importlib import import_module

import pytest
import torch
from torch import nn

from mmcnv2.models import ConvNeXtV2, kernels, mlp_on_gpu
from mmcnv2.models.depthwise import is_quicker_by_tiles
from mmcnv2.models.grn import GRN
from mmcnv2.models.layers import Block
from mmcnv2.models.layouts import DenseLayout
from mmcnv2.models.tiles import Tiles

from .test_depthwise import draw, shifted_products, visible_tokens
from .test_layouts import (
    CUSTOM,
    TOLERANCE,
    check_against_reference,
    encoder,
    random_mask,
)
from .test_mlp import layers, plain

pytest.importorskip('triton', reason='Triton is not installed: pip install triton')
HAS_GPU = torch.cuda.is_available()
if HAS_GPU and not kernels.fit(torch.empty(1, 8, device='cuda')):
    pytest.skip('there are no kernels for this GPU', allow_module_level=True)
DEVICE = 'cuda' if HAS_GPU else 'cpu'
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason='there is no GPU')

# The interpreter cuts off what does not fit into 16 bits.
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
# Less than a tile of whole pictures, and several, the last of which are cut; channels
# in less than a program and in several.
PICTURES = [
    ((2, 5, 3), 40, torch.float32),
    ((1, 8, 17), 8, torch.float32),
    ((2, 10, 8), 8, torch.bfloat16),
    ((1, 9, 7), 8, torch.float16),
]
PATCHES = [(side, 8, torch.float32) for side in (8, 4, 2, 1)] + [
    (4, 40, torch.float32),
    (2, 8, torch.bfloat16),
    (8, 8, torch.float16),
]


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """PyTorch's own are in 19 bits on GPUs unless they are told not to be."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.fixture
def depthwise(monkeypatch):
    module = import_module('mmcnv2.models.kernels.gpu.depthwise')
    if not HAS_GPU:
        # The interpreter takes as long for a program, however much that computes.
        monkeypatch.setattr(module, '_COLUMNS', 32)
        monkeypatch.setattr(module, '_STEPS', 2)
    return module


@pytest.fixture
def gpu(monkeypatch):
    module = import_module('mmcnv2.models.kernels.gpu.mlp')
    package = import_module('mmcnv2.models.kernels.gpu')
    monkeypatch.setattr(mlp_on_gpu, 'gpu', module, raising=False)
    monkeypatch.setattr(mlp_on_gpu, 'on_device_of', package.on_device_of, raising=False)
    return module


def on(*tensors):
    return [None if each is None else each.to(DEVICE) for each in tensors]


def check_convolution(depthwise, x, weight, bias, grad, tiles, expected):
    """Check output, gradients, and that any order of memory will do for weights."""
    x, weight, bias, grad = on(x, weight, bias, grad)
    # A row of which every second number is left out.
    bias = torch.stack((bias, bias), 1)[:, 0]
    taps = weight.flatten(1).t()
    sums = depthwise.sum_gradients(x, grad, tiles)
    found = (
        depthwise.convolve(x, taps, bias, tiles, turned=False),
        depthwise.convolve(grad, taps, None, tiles, turned=True),
        sums[:49].t().reshape(weight.shape),
        sums[49],
    )
    for one, other in zip(found, expected, strict=True):
        close = CLOSE[one.dtype] * other.abs().max()
        assert (one.cpu().double() - other).abs().max() <= close


@pytest.mark.parametrize(('size', 'channels', 'dtype'), PICTURES, ids=str)
def test_convolution_of_pictures(depthwise, size, channels, dtype):
    x, grad = (draw(*size, channels, dtype=dtype) for _ in range(2))
    grad = grad.flip(0, 1).contiguous()
    weight, bias = draw(channels, 1, 7, 7), draw(channels)
    expected = shifted_products(*(t.double() for t in (x, weight, bias, grad)))
    check_convolution(depthwise, x, weight, bias, grad, None, expected)


@pytest.mark.parametrize(('side', 'channels', 'dtype'), PATCHES, ids=str)
def test_convolution_of_patches(depthwise, side, channels, dtype):
    # Three of eight are seen, in each picture others.
    order = torch.rand(2, 8, generator=torch.Generator().manual_seed(side)).argsort(1)
    visible = (order >= 5).view(2, 2, 4)
    seen = visible.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]
    size = (2, 2 * side, 4 * side, channels)
    x, grad = (draw(*size, dtype=dtype) * seen for _ in range(2))
    grad = grad.flip(3) * seen
    weight, bias = draw(channels, 1, 7, 7), draw(channels)
    out, grad_x, *others = shifted_products(
        *(t.double() for t in (x, weight, bias, grad))
    )
    patches = visible.flatten().nonzero()[:, 0]
    tiles = Tiles.of_patches(visible.shape, patches.to(DEVICE), side)
    tokens = [
        visible_tokens(t, visible, side).contiguous() for t in (x, grad, out, grad_x)
    ]
    check_convolution(
        depthwise, tokens[0], weight, bias, tokens[1], tiles, [*tokens[2:], *others]
    )


def norm_and_layers(dim, hidden):
    """Return a norm and what follows it, on the CPU, in float64."""
    norm = nn.LayerNorm(dim, eps=1e-6, dtype=torch.float64)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm, *layers(dim, hidden, torch.float64)


def gradients(run, x, made, direction):
    x = x.clone().requires_grad_()
    out = run(x, *made)
    inputs = [x, *(p for layer in made for p in layer.parameters())]
    return out, *torch.autograd.grad(out, inputs, direction.to(out.dtype))


def normalise_first(x, norm, *made):
    return plain(norm(x), *made)


@pytest.mark.parametrize('dtype', CLOSE, ids=str)
@pytest.mark.parametrize(
    ('shape', 'hidden', 'most_steps'),
    [
        ((3, 5, 7, 12), 40, 10),
        # Two parts of a picture, and more than GRN's kernels add up.
        ((2, 13, 10, 24), 136, 10),
        ((2, 13, 10, 24), 136, 1),
        ((1, 1, 1, 8), 8, 10),
    ],
    ids=str,
)
def test_layers_are_one_after_the_other(
    gpu, monkeypatch, shape, hidden, most_steps, dtype
):
    monkeypatch.setattr(gpu, '_MOST_STEPS', most_steps)
    torch.manual_seed(0)
    made = norm_and_layers(shape[-1], hidden)
    x, direction = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    expected = gradients(normalise_first, x, made, direction)
    made = [layer.to(DEVICE, torch.float32) for layer in made]
    x, direction = on(x.float(), direction.float())
    autocasts = dict(dtype=dtype, enabled=dtype != torch.float32)
    with torch.autocast(DEVICE, **autocasts):
        found = gradients(mlp_on_gpu.normalise_and_project, x, made, direction)
        usual = gradients(normalise_first, x, made, direction)
    assert found[0].dtype == dtype
    for one, usually, other in zip(found, usual, expected, strict=True):
        apart, least = (
            (t.cpu().double() - other).abs().max() / other.abs().max()
            for t in (one, usually)
        )
        # Rounding in other places is not always to the same side.
        assert apart <= max(3 * least, 3 * CLOSE[dtype])


@pytest.mark.usefixtures('gpu')
def test_weights_in_16_bits_and_in_any_order_of_memory():
    torch.manual_seed(0)
    made = norm_and_layers(12, 40)
    x, direction = (torch.randn(2, 3, 5, 12, dtype=torch.float64) for _ in range(2))
    expected = gradients(normalise_first, x, made, direction)
    made = [layer.to(DEVICE, torch.float16) for layer in made]
    for parameter in (p for layer in made for p in layer.parameters()):
        parameter.data = torch.stack((parameter.data, parameter.data), -1)[..., 0]
        assert not parameter.is_contiguous()
    x, direction = on(x.half(), direction.half())
    found = gradients(mlp_on_gpu.normalise_and_project, x, made, direction)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float16
        assert (one.cpu() - other).abs().max() <= 5e-3 * other.abs().max()


@pytest.mark.usefixtures('gpu')
@pytest.mark.parametrize('frozen', [(1,), (1, 2, 3), (0, 2)], ids=str)
def test_frozen_layers(frozen):
    torch.manual_seed(0)
    made = [layer.to(DEVICE, torch.float32) for layer in norm_and_layers(8, 32)]
    x = torch.randn(2, 3, 5, 8, device=DEVICE, requires_grad=True)
    for i in frozen:
        made[i].requires_grad_(False)
    learning = [p for layer in made for p in layer.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(run(x, *made).square().sum(), [x, *learning])
        for run in (mlp_on_gpu.normalise_and_project, normalise_first)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def as_on_a_gpu(monkeypatch):
    def fit(x, *others):
        return all(each.device == x.device for each in others)

    monkeypatch.setattr(kernels, 'fit', fit)
    x = torch.empty(2, 3, 5, 8)

    class Features:
        """What does not lie on a CPU, as far as is asked."""

        is_cpu, is_meta = False, False

        def __getattr__(self, name):
            return getattr(x, name)

    return Features()


def test_layers_that_do_not_fit_are_left_to_pytorch(monkeypatch):
    x, block = as_on_a_gpu(monkeypatch), Block(8)

    def fits():
        made = block.pwconv1, block.act, block.grn, block.pwconv2
        return mlp_on_gpu.is_quicker_as_one(x, block.norm, *made)

    assert fits()
    block.grn = GRN(16)
    assert not fits()
    block.grn, block.norm = GRN(32), nn.LayerNorm(8, elementwise_affine=False)
    assert not fits()
    block.norm = nn.LayerNorm((5, 8))
    assert not fits()
    block.norm = nn.LayerNorm(8).to('meta')
    assert not fits()
    block.norm, block.act = nn.LayerNorm(8), nn.GELU('tanh')
    assert not fits()


@pytest.mark.usefixtures('gpu')
def test_second_derivatives():
    torch.manual_seed(0)
    made = norm_and_layers(8, 32)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)

    def second(run, x, made):
        x = x.clone().requires_grad_()
        inputs = [x, *(p for layer in made for p in layer.parameters())]
        out = (x + run(x, *made)).square().sum()
        grads = torch.autograd.grad(out, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    expected = second(normalise_first, x, made)
    made = [layer.to(DEVICE, torch.float32) for layer in made]
    found = second(mlp_on_gpu.normalise_and_project, x.float().to(DEVICE), made)
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu() - other).abs().max() <= 1e-4 * other.abs().max()


def test_gelu_everywhere(gpu):
    """As exact as torch's own, and what is no number stays none."""
    x = torch.linspace(-12, 12, 4096).view(1, -1, 8)
    exact = nn.functional.gelu(x.double())
    one, zero = torch.ones(1, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    found = gpu.gelu_scaled(x.to(DEVICE), zero, one, zero).cpu()
    assert ((found - exact) / x.abs().clamp(min=1)).abs().max() < 2.5e-7
    x = torch.tensor([float('nan'), float('inf')]).repeat(4).view(1, 1, 8)
    found = gpu.gelu_scaled(x.to(DEVICE), zero, one, zero).flatten()
    assert found.isnan().tolist() == [True, False] * 4
    assert found.isposinf().tolist() == [False, True] * 4


def test_they_are_for_gpus_alone():
    conv, block, x = nn.Conv2d(8, 8, 7, padding=3, groups=8), Block(8), draw(1, 8, 8, 8)
    made = block.norm, block.pwconv1, block.act, block.grn, block.pwconv2
    assert not mlp_on_gpu.is_quicker_as_one(x, *made)
    with torch.device('meta'):
        assert not mlp_on_gpu.is_quicker_as_one(torch.empty(1, 8, 8, 8), *made)
    assert not kernels.fit(x.to('meta'))
    assert not is_quicker_by_tiles(conv.to('meta'), x.to('meta'))


def test_where_triton_cannot_start_pytorch_computes(gpu, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError('Failed to find C compiler')

    device = torch.device(DEVICE)
    monkeypatch.setattr(kernels, 'on_device_of', mlp_on_gpu.on_device_of, raising=False)
    monkeypatch.setattr(kernels, 'gpu_mlp', gpu, raising=False)
    kernels._is_working.cache_clear()
    assert kernels._is_working(device)
    kernels._is_working.cache_clear()
    monkeypatch.setattr(gpu, 'grn_scale', fail)
    with pytest.warns(UserWarning, match=r'to find C compiler\..*apt-get install gcc'):
        assert not kernels._is_working(device)
    # It is not tried again.
    assert not kernels._is_working(device)
    kernels._is_working.cache_clear()


@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_chosen(dtype):
    block, x = Block(12).to(DEVICE), torch.randn(2, 9, 10, 12, device=DEVICE)
    made = block.norm, block.pwconv1, block.act, block.grn, block.pwconv2
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
        assert is_quicker_by_tiles(block.dwconv, x)
        assert mlp_on_gpu.is_quicker_as_one(x, *made)
        assert not mlp_on_gpu.is_quicker_as_one(x.double(), *made)
        expected = block(x, DenseLayout())
        seen = []
        for layer in (block.dwconv, block.act):
            layer.register_forward_hook(lambda *args: seen.append(args))
        found = block(x, DenseLayout())
    assert len(seen) == 2
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@needs_gpu
@pytest.mark.parametrize('ratio', [0.25, 0.6, 0.9])
@pytest.mark.parametrize(
    ('n', 'size'), [(1, (224, 224)), (2, (160, 288)), (5, (96, 64))], ids=str
)
def test_packed_equals_dense_masked(n, size, ratio):
    model = encoder(CUSTOM, torch.float32).to(DEVICE)
    mask = random_mask(n, size[0] // 32, size[1] // 32, ratio).to(DEVICE)
    check_against_reference(model, torch.randn(n, 3, *size, device=DEVICE), mask)


@needs_gpu
def test_dense_is_that_of_cpus():
    model, image = encoder(CUSTOM, torch.float32), torch.randn(2, 3, 100, 140)
    expected = model(image)
    for out, other in zip(model.to(DEVICE)(image.to(DEVICE)), expected, strict=True):
        torch.testing.assert_close(out.cpu(), other, **TOLERANCE[torch.float32])


@needs_gpu
@pytest.mark.parametrize('masked', [True, False])
def test_compiles_to_one_graph_for_all_masks(masked):
    model: ConvNeXtV2 = encoder(CUSTOM, torch.float32).to(DEVICE)
    params = list(model.parameters())
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    for stance in ('default', 'fail_on_recompile', 'fail_on_recompile'):
        image = torch.randn(2, 3, 96, 128, device=DEVICE)
        mask = random_mask(2, 3, 4, 0.6).to(DEVICE) if masked else None
        given = (mask, 5) if masked else ()
        with torch.compiler.set_stance(stance):
            outs = compiled(image, *given)
        expected = model(image, *given)
        torch.testing.assert_close(outs, expected, **TOLERANCE[torch.float32])
        grads, expected_grads = (
            torch.autograd.grad(sum(x.square().sum() for x in each), params)
            for each in (outs, expected)
        )
        torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-3)


@needs_gpu
def test_cuda_graph_serves_all_masks():
    model: ConvNeXtV2 = encoder(CUSTOM, torch.float32).to(DEVICE)
    image, mask = torch.randn(2, 3, 96, 128, device=DEVICE), random_mask(2, 3, 4, 0.6)
    params, mask = list(model.parameters()), mask.to(DEVICE)

    def step():
        (*_, out) = model(image, mask, 5)
        return out, *torch.autograd.grad(out.square().sum(), params, allow_unused=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(3):
        mask.copy_(random_mask(2, 3, 4, 0.6))
        graph.replay()
        torch.testing.assert_close(found, step(), rtol=1e-3, atol=1e-3)
