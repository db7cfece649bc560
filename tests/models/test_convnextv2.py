import io

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from torch import func, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextV2Backbone,
    ConvNextV2Config,
)

from mmcnv2.models import ARCHITECTURES, ConvNeXtV2
from mmcnv2.registry import MODELS

CUSTOM = dict(depths=(1, 2, 1, 2), dims=(6, 10, 14, 22))
# Kernels for convolutions take channels in multiples of 8.
EIGHTS = dict(depths=(1, 1, 1, 1), dims=(8, 24, 32, 40))

# Parameters of the classifier and multiply-adds of its features at 224 x 224, as
# mmpretrain's metafile gives them to the digit (the official README rounds them).
PUBLISHED = {
    'atto': (3_708_400, 551_718_080),
    'femto': (5_233_240, 784_892_544),
    'pico': (9_066_280, 1_374_072_320),
    'nano': (15_623_800, 2_454_926_720),
    'tiny': (28_635_496, 4_469_631_744),
    'base': (88_717_800, 15_382_561_792),
    'large': (197_956_840, 34_403_182_080),
    'huge': (660_289_640, 114_998_639_360),
}


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter a value that matters: GRN starts at zero otherwise."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            one = 1.0 if name.split('.')[-2].startswith('norm') else 0.0
            fan_in = param[0].numel() if param.dim() in (2, 4) else 25
            param.copy_(one * name.endswith('weight') + noise / fan_in**0.5)
    return model


def transformers_twin(model: ConvNeXtV2) -> tuple[nn.Module, dict[str, str]]:
    """Return transformers' own model with our weights, and the names of its parameters.

    The names are matched by hand, one rule a line, to share nothing with the package.
    """
    kind, config = (
        (ConvNextV2Backbone, ConvNextV2Config)
        if model.use_grn
        else (ConvNextBackbone, ConvNextConfig)
    )
    twin = kind(
        config(
            num_channels=model.in_channels,
            hidden_sizes=list(model.dims),
            depths=list(model.depths),
            out_features=['stage1', 'stage2', 'stage3', 'stage4'],
        )
    )
    names = {}
    for name in model.state_dict():
        other = name
        for i in range(4):
            other = other.replace(f'downsample_layers.{i}.', f'stages.{i}.downsample.')
            other = other.replace(f'norm{i}.', f'hidden_states_norms.stage{i + 1}.')
        other = other.replace('stages.0.downsample.0.', 'embeddings.patch_embeddings.')
        other = other.replace('stages.0.downsample.1.', 'embeddings.layernorm.')
        other = other.replace('downsample.', 'downsampling_layer.')
        other = other.replace('stages.', 'encoder.stages.')
        if name.startswith('stages.'):
            _, stage, block, rest = name.split('.', 3)
            rest = rest.replace('norm.', 'layernorm.')
            rest = rest.replace('grn.gamma', 'grn.weight').replace('beta', 'bias')
            rest = 'layer_scale_parameter' if rest == 'gamma' else rest
            other = f'encoder.stages.{stage}.layers.{block}.{rest}'
        names[name] = other
    weights = {names[name]: value for name, value in model.state_dict().items()}
    twin.load_state_dict(weights)
    return twin, names


@pytest.mark.parametrize('use_grn', [True, False], ids=['V2', 'V1'])
@pytest.mark.parametrize('arch', ['atto', 'tiny', CUSTOM], ids=str)
@pytest.mark.parametrize('size', [(64, 64), (75, 101)], ids=str)
def test_equals_transformers(arch, size, use_grn):
    model = randomise(ConvNeXtV2(arch, in_channels=3, use_grn=use_grn)).train()
    twin, names = transformers_twin(model)
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))

    outs = model(image)
    expected = twin(image).feature_maps
    grads = [torch.randn_like(out) for out in outs]
    torch.autograd.backward(outs, grads)
    torch.autograd.backward(expected, grads)

    for out, other in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, other, rtol=1e-4, atol=1e-4)
    twin_params = dict(twin.named_parameters())
    for name, param in model.named_parameters():
        other = twin_params[names[name]].grad
        scale = other.abs().max()
        torch.testing.assert_close(param.grad / scale, other / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_published_size(arch):
    normalised = 0

    def count(module, inputs, output):
        nonlocal normalised
        normalised += output.numel()

    with torch.device('meta'):
        backbone = ConvNeXtV2(arch, out_indices=(3,))
        head = nn.Linear(backbone.dims[-1], 1000)
        for module in backbone.modules():
            if isinstance(module, nn.LayerNorm) and module is not backbone.norm3:
                module.register_forward_hook(count)
        with FlopCounterMode(display=False) as counter:
            backbone(torch.empty(1, 3, 224, 224))
    # The classifier's last norm comes after the pooling.
    normalised += backbone.dims[-1]

    params = sum(p.numel() for m in (backbone, head) for p in m.parameters())
    # The counter counts a multiply-add as two and leaves LayerNorm, five operations
    # an element, out.
    flops = counter.get_total_flops() // 2 + 5 * normalised
    assert (params, flops) == PUBLISHED[arch]


@pytest.mark.parametrize(
    ('out_indices', 'stages'),
    [((0, 1, 2, 3), (0, 1, 2, 3)), ((-1,), (3,)), ((2, 0), (0, 2)), ((-3, 2), (1, 2))],
)
def test_out_indices(out_indices, stages):
    every = randomise(ConvNeXtV2(CUSTOM)).eval()
    some = ConvNeXtV2(CUSTOM, out_indices=out_indices).eval()
    some.load_state_dict(
        {k: v for k, v in every.state_dict().items() if k in some.state_dict()}
    )
    image = torch.randn(1, 3, 64, 96)
    outs = every(image)
    for out, stage in zip(some(image), stages, strict=True):
        torch.testing.assert_close(out, outs[stage], rtol=0, atol=0)
    assert len(some.stages) == max(stages) + 1


@pytest.mark.parametrize('output_norm', [True, False])
def test_average_before_the_norm(output_norm):
    """As the official classifier does; the norm of means is no mean of norms."""
    plain = randomise(ConvNeXtV2(CUSTOM, output_norm=False)).eval()
    kwargs = dict(output_norm=output_norm, gap_before_final_norm=True)
    model = randomise(ConvNeXtV2(CUSTOM, **kwargs)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    for i, (out, features) in enumerate(zip(model(image), plain(image), strict=True)):
        expected = features.mean((2, 3))
        if output_norm:
            norm = getattr(model, f'norm{i}')
            centred = expected - expected.mean(1, keepdim=True)
            spread = expected.var(1, unbiased=False, keepdim=True).add(1e-6).sqrt()
            expected = centred / spread * norm.weight + norm.bias
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_average_over_visible_positions():
    model = randomise(ConvNeXtV2(CUSTOM, output_norm=False)).eval()
    image = torch.randn(1, 3, 64, 96)
    mask = torch.tensor([[[True, False, False], [False, True, False]]])
    expected = [out.mean(1) for out in model(image, mask)]
    model.gap_before_final_norm = True
    torch.testing.assert_close(list(model(image, mask)), expected)


def test_mmcv_operators_read_the_outputs_right():
    ops = pytest.importorskip('mmcv.ops')
    features = ConvNeXtV2(CUSTOM)(torch.randn(2, 3, 64, 64))[0]
    rois = torch.tensor([[0.0, 1, 2, 9, 12], [1, 0, 0, 15, 8]])
    pooled = ops.RoIAlign((3, 3))(features, rois)
    expected = ops.RoIAlign((3, 3))(torch.tensor(features.tolist()), rois)
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (63, 32), (224, 160)], ids=str)
def test_any_size(size):
    outs = ConvNeXtV2(CUSTOM)(torch.randn(1, 3, *size))
    for i, out in enumerate(outs):
        stride = 2 ** (i + 2)
        shape = (1, CUSTOM['dims'][i], size[0] // stride, size[1] // stride)
        assert out.shape == shape


@pytest.mark.parametrize('use_grn', [True, False], ids=['V2', 'V1'])
def test_checkpointing_changes_nothing(use_grn):
    plain = randomise(ConvNeXtV2(CUSTOM, use_grn=use_grn)).train()
    saving = ConvNeXtV2(CUSTOM, use_grn=use_grn, with_cp=True).train()
    saving.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    for model in (plain, saving):
        model(image)[-1].square().sum().backward()
    for expected, param in zip(plain.parameters(), saving.parameters(), strict=True):
        if expected.grad is None:  # output norms of the other stages
            assert param.grad is None
            continue
        torch.testing.assert_close(param.grad, expected.grad, rtol=0, atol=0)


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
def test_frozen_stages(frozen_stages):
    model = ConvNeXtV2(CUSTOM, frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    for stage in range(4):
        stem_frozen = stage < max(frozen_stages, 1) and frozen_stages >= 0
        blocks_frozen = stage < frozen_stages
        for module, frozen in (
            (model.downsample_layers[stage], stem_frozen),
            (model.stages[stage], blocks_frozen),
        ):
            assert all(p.requires_grad != frozen for p in module.parameters())
            assert all(m.training != frozen for m in module.modules())


def test_drop_path_rates_grow_linearly():
    model = ConvNeXtV2('atto', drop_path_rate=0.22)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.02 * i for i in range(12)])


def test_drop_path_keeps_the_mean():
    block = ConvNeXtV2(CUSTOM, drop_path_rate=0.5).train().stages[3][1]
    dropped = block.drop_path(torch.ones(4000, 2, 2, 1))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (dropped.flatten(1).std(1) == 0).all()  # one decision a picture
    assert dropped.mean().item() == pytest.approx(1, abs=0.06)


def test_initialisation():
    model = MODELS.build(dict(type='ConvNeXtV2', arch='atto'))
    model.init_weights()
    for name, param in model.named_parameters():
        if name.endswith(('bias', 'beta', 'gamma')):
            assert (param == 0).all(), name
        elif param.dim() == 1:
            assert (param == 1).all(), name
        elif param.numel() > 1000:
            assert param.std().item() == pytest.approx(0.02, rel=0.1), name


def test_first_version_starts_as_published():
    model = ConvNeXtV2('atto', use_grn=False)
    model.init_weights()
    scales = [p for name, p in model.named_parameters() if name.endswith('.gamma')]
    assert len(scales) == 12
    assert all((scale == 1e-6).all() for scale in scales)


def test_published_size_of_the_first_version():
    """As mmpretrain's metafile gives the parameters of ConvNeXt-T."""
    with torch.device('meta'):
        backbone = ConvNeXtV2('tiny', out_indices=(3,), use_grn=False)
        head = nn.Linear(backbone.dims[-1], 1000)
    params = sum(p.numel() for m in (backbone, head) for p in m.parameters())
    assert params == 28_589_128


def test_loads_by_the_names_of_mmpretrain():
    """As part of a detector, say, whose other weights have the same names."""
    source = randomise(ConvNeXtV2(CUSTOM))
    weights = {}
    for ours, value in source.state_dict().items():
        name = ours.replace('dwconv', 'depthwise_conv')
        name = name.replace('pwconv', 'pointwise_conv')
        weights[f'0.{name}'] = value.flatten() if 'grn' in name else value
    weights['1.weight'] = torch.ones(1, 1)

    model = nn.Sequential(ConvNeXtV2(CUSTOM), nn.Linear(1, 1, bias=False))
    model.load_state_dict(weights)
    for name, value in source.state_dict().items():
        assert torch.equal(model[0].state_dict()[name], value), name


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        (ConvNeXtV2('atto'), r'of depths \(.* and dims .*, but .* that of atto; '),
        (
            ConvNeXtV2(dict(CUSTOM, depths=(1, 1, 1, 1))),
            r"that of depths \(1, 1, 1, 1\) and .*; 'stages\..*' is absent there, and",
        ),
        (
            ConvNeXtV2(dict(CUSTOM, depths=(1, 2, 1, 3))),
            r"of depths \(1, 2, 1, 3\) .*2\.dwconv\.bias' is \(22,\) there, and absent",
        ),
        (
            ConvNeXtV2(CUSTOM, in_channels=4),
            r"of 3 channels, .*'downsample_layers\.0\.0\.weight' is \(6, 4, 4, 4\)",
        ),
        (
            ConvNeXtV2(CUSTOM, use_grn=False),
            r"without GRN \(V1\); 'stages\.0\.0\.gamma' is \(6,\) there, and absent in "
            'the backbone.* adapt_grn=True if nothing but GRN does',
        ),
        (nn.Linear(2, 2), r'no whole ConvNeXt V2 there: 2 tensors \(weight, bias\)'),
        (nn.Module(), 'no weights by the backbone.* whole model .* init_cfg'),
    ],
    ids=['size', 'depths', 'deeper', 'channels', 'V1', 'another', 'nothing'],
)
def test_weights_of_another_network_are_an_error(other, message):
    """However it is loaded: MMEngine would only warn, and train from a random start."""
    model = nn.ModuleDict(dict(backbone=ConvNeXtV2(CUSTOM)))
    weights = {f'backbone.{k}': v for k, v in other.state_dict().items()}
    weights['head.weight'] = torch.ones(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        load_state_dict(model, weights, strict=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_output_norms_and_stages_may_be_fewer():
    whole = randomise(ConvNeXtV2(CUSTOM)).state_dict()
    fewer = ConvNeXtV2(CUSTOM, out_indices=(1,))
    fewer.load_state_dict(whole, strict=False)
    assert torch.equal(fewer.norm1.weight, whole['norm1.weight'])
    bare = {k: v for k, v in whole.items() if not k.startswith('norm')}
    model = ConvNeXtV2(CUSTOM)
    missing, unexpected = model.load_state_dict(bare, strict=False)
    assert len(missing) == 8
    assert not unexpected


@pytest.mark.parametrize('use_grn', [True, False], ids=['V2', 'V1'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_autocast_trains(dtype, use_grn):
    model = randomise(ConvNeXtV2(CUSTOM, use_grn=use_grn))
    image = torch.randn(2, 3, 64, 64)
    expected = model(image)[-1]
    with torch.autocast('cpu', dtype=dtype):
        out = model(image)[-1]
    out.float().square().mean().backward()
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize('arch', [CUSTOM, EIGHTS], ids=['odd', 'eights'])
def test_compiles_to_one_graph(arch, to_one_graph):
    model = randomise(ConvNeXtV2(arch))
    # The graph itself is what is tested; generating C++ for it would only take long.
    compiled = to_one_graph(model, backend='aot_eager')
    for size in [(2, 3, 64, 96), (1, 3, 75, 64)]:
        image = torch.randn(size)
        grads = []
        for run in (compiled, model):
            model.zero_grad()
            sum(out.square().sum() for out in run(image)).backward()
            grads.append([param.grad.clone() for param in model.parameters()])
        for grad, expected in zip(*grads, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)


def test_compiles(to_one_graph):
    """By PyTorch's own compiler, which takes our kernels as they are, since 2.13."""
    model = randomise(ConvNeXtV2(EIGHTS, out_indices=(0, 1)))
    compiled = to_one_graph(model, dynamic=False)
    image, params = torch.randn(2, 3, 75, 96), list(model.parameters())
    outs, expected = compiled(image), model(image)
    torch.testing.assert_close(outs, expected, rtol=1e-4, atol=1e-4)
    grads, expected_grads = (
        torch.autograd.grad(sum(x.square().sum() for x in each), params)
        for each in (outs, expected)
    )
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), expected, rtol=1e-4, atol=1e-4)
    with torch.profiler.profile() as profile:
        sum(out.sum() for out in compiled(image)).backward()
    called = {event.key for event in profile.key_averages()}
    for name in ('convolve', 'sum_gradients', 'expand_and_project_backward'):
        assert (f'mmcnv2::{name}' in called) == (torch.__version__ >= '2.13')


def test_compiles_what_functions_are_transformed_to(to_one_graph):
    """PyTorch's compiler tells nobody which gradients ``torch.func`` wants."""
    model = randomise(ConvNeXtV2(EIGHTS, out_indices=(1,)))
    image, params = torch.randn(2, 3, 64, 96), dict(model.named_parameters())

    def loss(params):
        (out,) = func.functional_call(model, params, (image,))
        return out.square().sum()

    compiled = to_one_graph(func.grad(loss), backend='aot_eager', dynamic=False)
    expected = torch.autograd.grad(loss(params), list(params.values()))
    found = list(compiled(params).values())
    torch.testing.assert_close(found, list(expected), rtol=1e-3, atol=1e-3)
    batched = func.vmap(lambda image: model(image))
    batched = to_one_graph(batched, backend='aot_eager', dynamic=False)
    with torch.no_grad():
        (out,) = batched(image[:, None])
        torch.testing.assert_close(out[:, 0], model(image)[0], rtol=1e-4, atol=1e-4)


def test_functions_are_transformed():
    """By ``torch.func``: gradients of each picture by itself."""
    model = randomise(ConvNeXtV2(EIGHTS, out_indices=(1,)))
    image, params = torch.randn(3, 3, 64, 96), dict(model.named_parameters())

    def loss(params, image):
        (out,) = func.functional_call(model, params, (image[None],))
        return out.square().sum()

    found = func.vmap(func.grad(loss), in_dims=(None, 0))(params, image)
    for i, picture in enumerate(image):
        expected = torch.autograd.grad(loss(params, picture), list(params.values()))
        grads = [each[i] for each in found.values()]
        torch.testing.assert_close(grads, list(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('strict', [True, False])
def test_exports_what_runs_without_us(strict):
    model, image = randomise(ConvNeXtV2(EIGHTS)).eval(), torch.randn(2, 3, 64, 96)
    program = torch.export.export(model, (image,), strict=strict)
    assert 'mmcnv2' not in program.graph_module.code
    for out, expected in zip(program.module()(image), model(image), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_is_traced_and_saved(tmp_path):
    model = randomise(ConvNeXtV2(CUSTOM)).eval()
    torch.jit.trace(model, torch.randn(1, 3, 64, 96)).save(tmp_path / 'traced.pt')
    traced = torch.jit.load(tmp_path / 'traced.pt')
    for size in [(1, 3, 64, 96), (2, 3, 75, 101)]:
        image = torch.randn(size)
        for out, expected in zip(traced(image), model(image), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_exports_to_onnx():
    onnxruntime = pytest.importorskip('onnxruntime')
    model = randomise(ConvNeXtV2(CUSTOM)).eval()
    image = torch.randn(1, 3, 64, 96)
    program = torch.onnx.export(
        model,
        (image,),
        dynamo=True,
        dynamic_shapes=({0: 'batch', 2: 'height', 3: 'width'},),
    )
    buffer = io.BytesIO()
    program.save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    for size in [(1, 3, 64, 96), (2, 3, 75, 101)]:
        image = torch.randn(size)
        outs = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        for out, expected in zip(outs, model(image), strict=True):
            torch.testing.assert_close(
                torch.from_numpy(out), expected, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='small'), "unknown arch 'small'; choose one of atto, femto"),
        (dict(arch=dict(depths=(1, 1, 1, 1))), "a dict of 'depths' and 'dims'"),
        (dict(arch=dict(depths=(1, 1, 1), dims=(8,) * 4)), r'depths holds 4 .*1, 1\)'),
        (dict(arch=dict(depths=(1,) * 4, dims=96)), 'dims holds 4 positive.* 96'),
        (dict(arch=dict(depths='2262', dims=(8,) * 4)), "depths holds 4.* '2262'"),
        (dict(arch=dict(depths=(1, 1, -1, 1), dims=(8,) * 4)), 'depths holds 4 pos'),
        (dict(in_channels=0), 'in_channels is 0; give a positive number'),
        (dict(out_indices=()), 'at least one'),
        (dict(out_indices=(0, 4)), 'from -4 to 3'),
        (dict(out_indices=(3, -1)), 'different stages'),
        (dict(frozen_stages=5), 'frozen_stages is 5; give it from -1'),
        (dict(drop_path_rate=1.0), r'drop_path_rate is 1.0; give it in \[0, 1\)'),
        (dict(init_cfg=dict(checkpoint='a.pth')), r"has no type; give .*'Pretrained'"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ConvNeXtV2(**kwargs)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch=None), r'arch of ConvNeXtV2 is None, .* expected was str \| dict'),
        (
            dict(out_indices=3),
            r'out_indices .* is 3, .* expected was .*Sequence\[int\]',
        ),
        (dict(out_indices=(1.0,)), r'out_indices .* is \(1.0,\), of type tuple'),
        (dict(drop_path_rate='0.1'), r"is '0\.1', of type str, but expected was float"),
        (dict(with_cp=1), 'with_cp of ConvNeXtV2 is 1, of type int'),
        (dict(no_such_key=1), 'no_such_key'),
    ],
)
def test_wrong_types(kwargs, message):
    with pytest.raises(TypeError, match=message):
        ConvNeXtV2(**kwargs)


def test_wrong_pictures():
    model = ConvNeXtV2(CUSTOM, in_channels=4)
    with pytest.raises(ValueError, match=r'\(N, 4, H, W\) expected.*\(1, 3, 64, 64\)'):
        model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r'at least 32 pixels.*\(64, 31\)'):
        model(torch.zeros(1, 4, 64, 31))
