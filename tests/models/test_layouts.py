"""Running on visible patches equals running on everything and masking every step."""

import sys

import pytest
import torch

from mmcnv2.models import ConvNeXtV2
from mmcnv2.models.kernels import cpu
from mmcnv2.models.layouts import PackedLayout

from ..conftest import needs_minkowski
from .masked_reference import masked_encoder, visible_tokens

# Compiled kernels take multiples of eight channels in 32 bits, torch all else.
CUSTOM = dict(depths=(1, 2, 1, 2), dims=(8, 24, 32, 40))
ODD = dict(depths=(1, 1, 1, 1), dims=(6, 10, 14, 22))
TOLERANCE = {
    torch.float32: dict(rtol=1e-3, atol=1e-4),
    torch.float64: dict(rtol=1e-9, atol=1e-10),
}

SPARSE = ['packed', pytest.param('minkowski', marks=needs_minkowski)]


def encoder(arch, dtype, **kwargs):
    torch.manual_seed(0)
    model = ConvNeXtV2(arch, output_norm=False, **kwargs).to(dtype)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(('gamma', 'beta', 'bias')):
                param.normal_(std=0.3)
    return model


def random_mask(n, h, w, ratio):
    hidden = min(max(round(h * w * ratio), 1), h * w - 1)
    order = torch.rand(n, h * w).argsort(1)
    return (order < hidden).view(n, h, w)


def check_against_reference(model, image, mask):
    names, params = zip(*model.named_parameters(), strict=True)
    tolerance = TOLERANCE[image.dtype]
    image.requires_grad_()
    outs = model(image, mask)
    reference = masked_encoder(
        dict(model.named_parameters()), model.depths, image, mask
    )
    expected = [visible_tokens(x, mask) for x in reference]
    directions = [torch.randn_like(out) for out in outs]
    inputs = (image, *params)
    grads = torch.autograd.grad(outs, inputs, directions)
    expected_grads = torch.autograd.grad(expected, inputs, directions)

    for out, other in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, other, **tolerance)
    for name, grad, other in zip(('image', *names), grads, expected_grads, strict=True):
        scale = other.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            grad / scale, other / scale, **tolerance, msg=lambda m, n=name: f'{n}: {m}'
        )


@pytest.mark.parametrize('sparse', SPARSE)
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('ratio', [0.25, 0.6, 0.9])
@pytest.mark.parametrize(
    ('n', 'size'),
    [(1, (224, 224)), (2, (160, 288)), (5, (96, 64))],
    ids=str,
)
def test_equals_dense_masked(n, size, ratio, dtype, sparse):
    model = encoder(CUSTOM, dtype, sparse=sparse)
    mask = random_mask(n, size[0] // 32, size[1] // 32, ratio)
    check_against_reference(model, torch.randn(n, 3, *size, dtype=dtype), mask)


def test_odd_numbers_of_channels_equal_dense_masked():
    mask = random_mask(2, 3, 4, 0.6)
    image = torch.randn(2, 3, 96, 128)
    check_against_reference(encoder(ODD, torch.float32), image, mask)


def test_kernels_are_not_needed(monkeypatch):
    model = encoder(CUSTOM, torch.float32)
    mask, image = random_mask(2, 3, 4, 0.6), torch.randn(2, 3, 96, 128)
    expected = model(image, mask), model(image)
    monkeypatch.setattr(cpu, '_LIBRARY', None)
    check_against_reference(model, image, mask)
    for outs, others in zip((model(image, mask), model(image)), expected, strict=True):
        for out, other in zip(outs, others, strict=True):
            torch.testing.assert_close(out, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('sparse', SPARSE)
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_first_version_equals_dense_masked(dtype, sparse):
    model = encoder(CUSTOM, dtype, sparse=sparse, use_grn=False)
    mask = random_mask(2, 3, 4, 0.6)
    check_against_reference(model, torch.randn(2, 3, 96, 128, dtype=dtype), mask)


@pytest.mark.parametrize('sparse', SPARSE)
@pytest.mark.parametrize('arch', ['atto', 'tiny'])
def test_published_sizes_equal_dense_masked(arch, sparse):
    model = encoder(arch, torch.float64, sparse=sparse)
    mask = random_mask(2, 3, 4, 0.6)
    image = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    check_against_reference(model, image, mask)


def test_nothing_hidden_equals_the_dense_encoder():
    model = encoder(CUSTOM, torch.float64)
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    for out, dense in zip(model(image, mask), model(image), strict=True):
        torch.testing.assert_close(out, visible_tokens(dense, mask))


@pytest.mark.parametrize('sparse', SPARSE)
def test_hidden_pixels_have_no_influence(sparse):
    model = encoder(CUSTOM, torch.float32, sparse=sparse)
    mask = random_mask(3, 3, 4, 0.6)
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    image = torch.randn(3, 3, 96, 128, requires_grad=True)
    outs = model(image, mask)
    sum(out.square().sum() for out in outs).backward()
    assert (image.grad * hidden == 0).all()
    assert (image.grad * ~hidden != 0).any()

    other = torch.where(hidden, 1e6 * torch.randn_like(image), image)
    for out, same in zip(outs, model(other, mask), strict=True):
        assert torch.equal(out, same)


@pytest.mark.parametrize('sparse', SPARSE)
def test_companions_have_no_influence(sparse):
    model = encoder(CUSTOM, torch.float64, sparse=sparse)
    mask = random_mask(3, 3, 4, 0.6)
    image = torch.randn(3, 3, 96, 128, dtype=torch.float64)
    for out, alone in zip(
        model(image, mask), model(image[1:2], mask[1:2]), strict=True
    ):
        torch.testing.assert_close(out[1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('sparse', SPARSE)
@pytest.mark.parametrize('use_grn', [True, False], ids=['V2', 'V1'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, use_grn, sparse):
    model = encoder(CUSTOM, torch.float32, sparse=sparse, use_grn=use_grn)
    mask = random_mask(2, 3, 4, 0.6)
    image = torch.randn(2, 3, 96, 128)
    expected = model(image, mask)[-1]
    with torch.autocast('cpu', dtype=dtype):
        out = model(image, mask)[-1]
    out.float().square().mean().backward()
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('sparse', SPARSE)
def test_checkpointing_changes_nothing(sparse):
    plain, saving = (
        encoder(CUSTOM, torch.float32, sparse=sparse, with_cp=with_cp)
        for with_cp in (False, True)
    )
    mask = random_mask(2, 3, 4, 0.6)
    image = torch.randn(2, 3, 96, 128)
    for model in (plain, saving):
        model(image, mask)[-1].square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        # MinkowskiEngine's threads add up in any order.
        exact = (
            dict(rtol=0, atol=0) if sparse == 'packed' else dict(rtol=1e-4, atol=1e-3)
        )
        torch.testing.assert_close(b.grad, a.grad, **exact)


def test_wrong_masks():
    model = encoder(CUSTOM, torch.float32)
    image = torch.zeros(2, 3, 64, 96)
    uneven = torch.zeros(2, 2, 3, dtype=torch.bool)
    uneven[0, 0, 0] = True
    with pytest.raises(ValueError, match=r'visible ones are \[5, 6\]'):
        model(image, uneven)
    with pytest.raises(ValueError, match=r'bool mask of shape \(2, 2, 3\) expected'):
        model(image, torch.zeros(2, 3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r'bool mask.*torch.float32'):
        model(image, torch.zeros(2, 2, 3))
    all_hidden = torch.tensor([[[True, True, False]] * 2, [[True] * 3] * 2])
    with pytest.raises(ValueError, match='hides a picture entirely'):
        model(image, all_hidden)
    with pytest.raises(ValueError, match=r'multiples of 32, but got \(64, 97\)'):
        model(torch.zeros(2, 3, 64, 97), torch.zeros(2, 2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match='num_visible is 5, but the mask shows 6 pat'):
        model(image, torch.zeros(2, 2, 3, dtype=torch.bool), num_visible=5)
    with pytest.raises(ValueError, match='num_visible is 6, but there is no mask'):
        model(image, num_visible=6)
    with pytest.raises(ValueError, match='there are no pictures to mask'):
        model(image[:0], torch.zeros(0, 2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match='mask is on cpu and the pictures on meta'):
        model(image.to('meta'), torch.zeros(2, 2, 3, dtype=torch.bool))


@pytest.mark.parametrize('arch', [ODD, CUSTOM], ids=['odd', 'custom'])
def test_compiles_to_one_graph_for_all_masks(arch, to_one_graph):
    model = encoder(arch, torch.float32)
    params = list(model.parameters())
    # The graph itself is what is tested; generating C++ for it would only take long.
    compiled = to_one_graph(model, dynamic=False, backend='aot_eager')
    for stance in ('default', 'fail_on_recompile', 'fail_on_recompile'):
        image, mask = torch.randn(2, 3, 96, 128), random_mask(2, 3, 4, 0.6)
        with torch.compiler.set_stance(stance):
            outs = compiled(image, mask, num_visible=5)
        expected = model(image, mask)
        torch.testing.assert_close(outs, expected, **TOLERANCE[torch.float32])
        grads, expected_grads = (
            torch.autograd.grad(sum(x.square().sum() for x in each), params)
            for each in (outs, expected)
        )
        torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-3)


def test_compiles_with_checkpoints_too(to_one_graph):
    model = encoder(CUSTOM, torch.float32, with_cp=True)
    compiled = to_one_graph(model, backend='aot_eager')
    image, mask = torch.randn(2, 3, 64, 96), random_mask(2, 2, 3, 0.5)
    visible = int((~mask[0]).sum())
    grads = []
    for run in (compiled, model):
        model.zero_grad()
        sum(out.square().sum() for out in run(image, mask, visible)).backward()
        grads.append([param.grad for param in model.parameters()])
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('compiled', [True, False])
@pytest.mark.parametrize('ratio', [0.5, 0.0])
def test_second_derivatives(ratio, compiled, monkeypatch):
    """By kernels and without, of packed and of whole pictures."""
    if not compiled:
        monkeypatch.setattr(cpu, '_LIBRARY', None)
    arch = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    model, image = encoder(arch, torch.float32), torch.randn(2, 3, 64, 96)
    mask = random_mask(2, 2, 3, ratio) if ratio else torch.zeros(2, 2, 3).bool()
    exact = {name: value.double() for name, value in model.named_parameters()}

    def second(outs, params):
        loss = sum(out.square().sum() for out in outs)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        square = sum(grad.square().sum() for grad in grads)
        return torch.autograd.grad(square, params)

    found = second(model(image, mask if ratio else None), [*model.parameters()])
    reference = masked_encoder(exact, model.depths, image.double(), mask)
    for one, other in zip(found, second(reference, [*exact.values()]), strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_unknown_sparse_layout():
    with pytest.raises(ValueError, match="'dense'; give one of packed, minkowski"):
        ConvNeXtV2('atto', sparse='dense')


def test_minkowski_engine_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, 'MinkowskiEngine', None)
    with pytest.raises(ImportError, match=r'bash tools/install_minkowski\.sh'):
        ConvNeXtV2('atto', sparse='minkowski')


def test_gradients_may_be_asked_for_twice_and_out_of_turn():
    model = encoder(CUSTOM, torch.float64)
    pictures = [torch.randn(2, 3, 96, 64, dtype=torch.float64) for _ in range(2)]
    masks = [random_mask(2, 3, 2, 0.5) for _ in range(2)]
    weight = model.stages[0][0].dwconv.weight

    def grad(outs, **kwargs):
        return torch.autograd.grad(
            sum(o.square().sum() for o in outs), weight, **kwargs
        )

    expected = [grad(model(*each)) for each in zip(pictures, masks, strict=True)]
    first, second = (model(*each) for each in zip(pictures, masks, strict=True))
    for outs, other in ((first, expected[0]), (second, expected[1])):
        for _ in range(2):
            torch.testing.assert_close(grad(outs, retain_graph=True), other)


@pytest.mark.parametrize(
    'name', ['downsample_layers.0.0', 'downsample_layers.1.1', 'stages.1.0.dwconv']
)
def test_convolutions_may_be_observed(name):
    model, image = encoder(CUSTOM, torch.float32), torch.randn(2, 3, 96, 64)
    mask, seen = random_mask(2, 3, 2, 0.5), []
    expected = model(image, mask)
    conv = model.get_submodule(name)
    conv.register_forward_hook(lambda module, args, out: seen.append(out))
    for out, other in zip(model(image, mask), expected, strict=True):
        torch.testing.assert_close(out, other)
    assert seen[0].shape[1] == len(conv.weight)


@pytest.mark.parametrize('arch', [CUSTOM, ODD], ids=['eights', 'odd'])
def test_functions_are_transformed(arch):
    """By ``torch.func``: the gradient, and one picture after the other."""
    model, image = encoder(arch, torch.float32), torch.randn(2, 3, 96, 64)
    params, mask = dict(model.named_parameters()), random_mask(2, 3, 2, 0.5)

    def loss(params):
        outs = torch.func.functional_call(model, params, (image, mask))
        return sum(out.square().sum() for out in outs)

    expected = torch.autograd.grad(loss(params), list(params.values()))
    found = [*torch.func.grad(loss)(params).values()]
    torch.testing.assert_close(found, [*expected], rtol=1e-3, atol=1e-3)
    one = mask[:1]
    outs = torch.func.vmap(lambda x: model(x[None], one))(image)
    for found, other in zip(outs, model(image, one.expand(2, -1, -1)), strict=True):
        torch.testing.assert_close(found[:, 0], other, rtol=1e-4, atol=1e-4)


class Halved(torch.nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 2


def test_what_is_put_in_the_place_of_a_downsampling_is_run():
    layout = PackedLayout(torch.zeros(2, 1, 1, dtype=torch.bool), num_visible=1)
    x, conv = torch.randn(2, 64, 8), Halved(8, 16, 2, 2)
    pictures = x.unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    expected = conv(pictures).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layout.downsample(conv, x), expected)
    conv = torch.nn.Conv2d(8, 16, 2, 2)
    original = conv.forward
    conv.forward = lambda x: 3 * original(x)
    expected = conv(pictures).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layout.downsample(conv, x), expected)
