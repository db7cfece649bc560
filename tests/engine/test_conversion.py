"""Each format against a table written by hand, and against the library's own model."""

import re
import sys
from argparse import Namespace
from itertools import pairwise, product
from pathlib import Path
from zlib import crc32

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from mmcnv2.engine.conversion import (
    TARGETS,
    convert_checkpoint,
    convert_weights,
    find_format,
    load_weights,
    save_weights,
)
from mmcnv2.models import ARCHITECTURES, ConvNeXtV2
from mmcnv2.models.fcmae import FCMAEDecoder
from mmcnv2.models.layouts import import_minkowski_engine

from ..conftest import needs_minkowski

try:
    engine = import_minkowski_engine()
except ImportError:
    engine = None

Weights = dict[str, Tensor]

CUSTOM = dict(depths=(1, 2, 1, 2), dims=(6, 10, 14, 22))
CLASSES = 5

# Layers in ours, official, timm, transformers (below 'convnextv2.') and mmpretrain, of
# block j of stage i; the last rows are the stem's. It shares nothing with the package.
TABLE = """
downsample_layers.{i}.0 downsample_layers.{i}.0 stages.{i}.downsample.0 encoder.stages.{i}.downsampling_layer.0 downsample_layers.{i}.0
downsample_layers.{i}.1 downsample_layers.{i}.1 stages.{i}.downsample.1 encoder.stages.{i}.downsampling_layer.1 downsample_layers.{i}.1
stages.{i}.{j}.dwconv stages.{i}.{j}.dwconv stages.{i}.blocks.{j}.conv_dw encoder.stages.{i}.layers.{j}.dwconv stages.{i}.{j}.depthwise_conv
stages.{i}.{j}.norm stages.{i}.{j}.norm stages.{i}.blocks.{j}.norm encoder.stages.{i}.layers.{j}.layernorm stages.{i}.{j}.norm
stages.{i}.{j}.pwconv1 stages.{i}.{j}.pwconv1 stages.{i}.blocks.{j}.mlp.fc1 encoder.stages.{i}.layers.{j}.pwconv1 stages.{i}.{j}.pointwise_conv1
stages.{i}.{j}.grn stages.{i}.{j}.grn stages.{i}.blocks.{j}.mlp.grn encoder.stages.{i}.layers.{j}.grn stages.{i}.{j}.grn
stages.{i}.{j}.pwconv2 stages.{i}.{j}.pwconv2 stages.{i}.blocks.{j}.mlp.fc2 encoder.stages.{i}.layers.{j}.pwconv2 stages.{i}.{j}.pointwise_conv2
norm3 norm head.norm layernorm norm3
downsample_layers.0.0 downsample_layers.0.0 stem.0 embeddings.patch_embeddings downsample_layers.0.0
downsample_layers.0.1 downsample_layers.0.1 stem.1 embeddings.layernorm downsample_layers.0.1
"""  # noqa: E501
COLUMNS = ('ours', 'official', 'timm', 'transformers', 'mmpretrain')
HEADS = dict(
    ours='head.fc',
    official='head',
    timm='head.fc',
    transformers='classifier',
    mmpretrain='head.fc',
)
PREFIXES = dict(ours='backbone.', transformers='convnextv2.', mmpretrain='backbone.')


def backbone(arch: dict = CUSTOM, **kwargs) -> ConvNeXtV2:
    """Build one whose parameters all matter."""
    model = ConvNeXtV2(arch, **kwargs).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            generator = torch.Generator().manual_seed(crc32(name.encode()))
            one = float(param.dim() == 1 and name.endswith('weight'))
            param.copy_(one + 0.3 * torch.randn(param.shape, generator=generator))
    return model


def layers(column: str) -> dict[str, str]:
    """Return the names of layers in a format by ours."""
    names = {}
    for row in TABLE.strip().splitlines():
        cells = dict(zip(COLUMNS, row.split(), strict=True))
        for i, j in product(range(4), range(2)):
            names[cells['ours'].format(i=i, j=j)] = cells[column].format(i=i, j=j)
    return names


def classifier(column: str, **kwargs) -> Weights:
    """Return a whole classifier in a format, by the table."""
    weights = {}
    for name, value in backbone(out_indices=(3,), **kwargs).state_dict().items():
        layer, kind = name.rsplit('.', 1)
        if column in ('timm', 'transformers'):
            kind = dict(gamma='weight', beta='bias').get(kind, kind)
        if column in ('timm', 'mmpretrain') and 'grn' in layer:
            value = value.flatten()
        prefix = PREFIXES.get(column, '')
        weights[f'{prefix}{layers(column).get(layer, layer)}.{kind}'] = value
    shape = (CLASSES, CUSTOM['dims'][-1])
    generator = torch.Generator().manual_seed(1)
    for kind, size in (('weight', shape), ('bias', shape[:1])):
        weights[f'{HEADS[column]}.{kind}'] = torch.randn(size, generator=generator)
    return weights


def sparse(picture_channels: int = 3) -> tuple[Weights, Weights]:
    """Return FCMAE in ours and as the official sparse code stores it, by index."""
    decoder = FCMAEDecoder(CUSTOM['dims'][-1], picture_channels, 8, 2)
    generator = torch.Generator().manual_seed(2)
    ours = {
        f'backbone.{name}': value
        for name, value in backbone(in_channels=picture_channels).state_dict().items()
        if not name.startswith('norm')
    }
    for name, value in decoder.state_dict().items():
        ours[f'neck.{name}'] = torch.randn(value.shape, generator=generator)
    theirs = {}
    for name, value in ours.items():
        if name.startswith('backbone.'):
            name, value = sparse_parameter(name.removeprefix('backbone.'), value)
            theirs[f'encoder.{name}'] = value
        elif name.endswith(('proj.weight', 'pred.weight')):
            theirs[name.removeprefix('neck.')] = value[..., None, None]
        elif name.endswith('mask_token'):
            theirs['mask_token'] = value[None, :, None, None]
        else:
            theirs[name.removeprefix('neck.')] = value
    return ours, theirs


def sparse_parameter(name: str, value: Tensor) -> tuple[str, Tensor]:
    layer, kind = name.rsplit('.', 1)
    if layer.startswith('downsample_layers.0'):
        return name, value
    if layer.endswith('grn'):
        return name, value[0, 0]
    if 'pwconv' in layer:
        return f'{layer}.linear.{kind}', value
    if value.dim() == 1 and (layer.endswith('norm') or layer[-1] == '0'):
        return f'{layer}.ln.{kind}', value
    if kind == 'bias':
        return name, value[None]
    side = value.shape[-1]
    places = [(row, column) for column in range(side) for row in range(side)]
    kernel = torch.stack([value[:, :, row, column].T for row, column in places])
    return f'{layer}.kernel', kernel[:, 0] if 'dwconv' in layer else kernel


def assert_same(found: Weights, expected: Weights) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize('target', COLUMNS)
@pytest.mark.parametrize('source', COLUMNS)
def test_every_pair_of_formats(source, target):
    weights = classifier(source)
    assert find_format(weights) == source
    conversion = convert_weights(weights, target)
    assert_same(conversion.weights, classifier(target))
    assert_same(convert_weights(conversion.weights, source).weights, weights)
    assert str(conversion) == (
        f'{source} -> {target}: depths (1, 2, 1, 2) and dims (6, 10, 14, 22), '
        f'{len(weights)} tensors converted, left out: nothing'
    )


@pytest.mark.parametrize('target', ['official', 'timm', 'mmpretrain'])
def test_first_version(target):
    """LayerScale has the same name and shape everywhere, and GRN has none."""
    decoder = FCMAEDecoder(CUSTOM['dims'][-1], 3, 8, use_grn=False).state_dict()
    weights = classifier('ours', use_grn=False)
    there = convert_weights(weights, target).weights
    plain = {k: v for k, v in classifier(target).items() if 'grn' not in k}
    scales = {k: v for k, v in there.items() if k.endswith('gamma')}
    block = '.blocks' if target == 'timm' else ''
    assert f'{PREFIXES.get(target, "")}stages.1{block}.1.gamma' in scales
    assert_same(there, {**plain, **scales})
    assert_same(convert_weights(there, 'ours').weights, weights)

    neck = {f'neck.{name}': value for name, value in decoder.items()}
    assert_same(convert_weights({**weights, **neck}, 'ours').weights, weights | neck)
    with pytest.raises(ValueError, match="first version, which 'transformers' has no"):
        convert_weights(there, 'transformers')


@pytest.mark.parametrize('target', ['mmpretrain', 'transformers-backbone'])
def test_detectors_keep_the_norms_of_all_stages(target):
    weights = {f'backbone.{k}': v for k, v in backbone().state_dict().items()}
    there = convert_weights(weights, target).weights
    assert len(there) == len(weights)
    assert find_format(there) == target
    assert_same(convert_weights(there, 'ours').weights, weights)


@pytest.mark.parametrize('target', ['official', 'timm', 'transformers'])
def test_what_has_no_place_is_left_out_and_told(target):
    weights = {f'backbone.{k}': v for k, v in backbone().state_dict().items()}
    more = {f'neck.fpn_convs.{i}.conv.weight': torch.ones(1) for i in range(2)}
    conversion = convert_weights({**weights, **more}, target)
    head = f'{HEADS[target]}.'
    expected = classifier(target).items()
    assert_same(conversion.weights, {k: v for k, v in expected if head not in k})
    left_out = [f'backbone.norm{i} (2)' for i in range(3)]
    assert str(conversion).endswith(f'left out: {", ".join(left_out)}, neck (2)')
    assert set(more) < set(conversion.left_out)


def test_half_precision_and_other_pictures_stay():
    weights = {k: v.bfloat16() for k, v in classifier('timm', in_channels=4).items()}
    there = convert_weights(weights, 'transformers').weights
    assert there['convnextv2.embeddings.patch_embeddings.weight'].shape[1] == 4
    assert_same(convert_weights(there, 'timm').weights, weights)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_tells_the_size(arch):
    with torch.device('meta'):
        weights = ConvNeXtV2(arch).state_dict()
    named = {f'backbone.{name}': value for name, value in weights.items()}
    there = convert_weights(named, 'timm')
    assert there.size == arch
    # In timm the pointwise layers of the small ones are 1x1 convolutions.
    convolves = arch in ('atto', 'femto', 'pico', 'nano')
    shape = there.weights['stages.3.blocks.1.mlp.fc2.weight'].shape
    assert shape[2:] == ((1, 1) if convolves else ())
    back = convert_weights(there.weights, 'mmpretrain').weights
    shape = back['backbone.stages.3.1.pointwise_conv2.weight'].shape
    assert shape == weights['stages.3.1.pwconv2.weight'].shape


def logits(weights: Weights, picture: Tensor) -> Tensor:
    """Classify as the official code does, by our backbone."""
    model = backbone(output_norm=False, out_indices=(3,))
    model.load_state_dict({k: v for k, v in weights.items() if k in model.state_dict()})
    pooled = model(picture)[0].mean((2, 3))
    norm = (weights['norm.weight'], weights['norm.bias'])
    normed = layer_norm(pooled, pooled.shape[1:], *norm, eps=1e-6)
    return linear(normed, weights['head.weight'], weights['head.bias'])


def random_picture() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


def test_transformers_classifies_the_same(tmp_path):
    weights = classifier('official')
    config = transformers.ConvNextV2Config(
        hidden_sizes=list(CUSTOM['dims']),
        depths=list(CUSTOM['depths']),
        num_labels=CLASSES,
    )
    config.save_pretrained(tmp_path)
    torch.save({'model': weights}, tmp_path / 'official.pt')
    file = tmp_path / 'model.safetensors'
    convert_checkpoint(tmp_path / 'official.pt', file, 'transformers')
    twin = transformers.ConvNextV2ForImageClassification.from_pretrained(tmp_path)
    found, expected = twin(random_picture()).logits, logits(weights, random_picture())
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert_same(convert_weights(twin.state_dict(), 'official').weights, weights)


def test_timm_classifies_the_same():
    convnext = pytest.importorskip('timm.models.convnext', reason='timm is absent')
    weights = classifier('official')
    arch = dict(CUSTOM, use_grn=True, ls_init_value=None)
    twin = convnext.ConvNeXt(**arch, num_classes=CLASSES).eval()
    twin.load_state_dict(convert_weights(weights, 'timm').weights)
    found, expected = twin(random_picture()), logits(weights, random_picture())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert_same(convert_weights(twin.state_dict(), 'official').weights, weights)

    for build in (convnext.convnextv2_atto, convnext.convnext_atto):
        small = build().state_dict()
        there = convert_weights(small, 'ours').weights
        assert_same(convert_weights(there, 'timm').weights, small)


def test_mmpretrain_classifies_the_same():
    models = pytest.importorskip('mmpretrain.models', reason='mmpretrain is absent')
    weights = classifier('official')
    arch = dict(depths=list(CUSTOM['depths']), channels=list(CUSTOM['dims']))
    twin = nn.Module()
    twin.backbone = models.ConvNeXt(arch, use_grn=True, layer_scale_init_value=0.0)
    twin.head = models.LinearClsHead(CLASSES, CUSTOM['dims'][-1])
    twin.eval().load_state_dict(convert_weights(weights, 'mmpretrain').weights)
    found = twin.head(twin.backbone(random_picture()))
    expected = logits(weights, random_picture())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert_same(convert_weights(twin.state_dict(), 'official').weights, weights)


def test_transformers_backbone_has_the_same_features():
    model = backbone()
    weights = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    twin = transformers.ConvNextV2Backbone(
        transformers.ConvNextV2Config(
            hidden_sizes=list(CUSTOM['dims']),
            depths=list(CUSTOM['depths']),
            out_features=['stage1', 'stage2', 'stage3', 'stage4'],
        )
    ).eval()
    twin.load_state_dict(convert_weights(weights, 'transformers-backbone').weights)
    found_maps = twin(random_picture()).feature_maps
    for found, expected in zip(found_maps, model(random_picture()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('picture_channels', [3, 4])
def test_sparse_checkpoints(picture_channels):
    ours, theirs = sparse(picture_channels)
    assert find_format(theirs) == 'official-sparse'
    conversion = convert_weights(theirs, 'ours')
    assert_same(conversion.weights, ours)
    assert conversion.left_out == ()
    # Pre-training goes on, or is converted again, with the decoder.
    assert_same(convert_weights(ours, 'ours').weights, ours)

    dense = convert_weights(theirs, 'official')
    encoder = {k.removeprefix('backbone.'): v for k, v in ours.items()}
    assert_same(dense.weights, {k: v for k, v in encoder.items() if 'neck' not in k})
    assert 'left out: mask_token (1), proj (2), decoder (20), pred (2)' in str(dense)


class SparseLayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        return like(x, self.ln(x.F))


class SparseBlock(nn.Module):
    """The paper's, by MinkowskiEngine's modules."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = engine.MinkowskiChannelwiseConvolution(
            dim, kernel_size=7, bias=True, dimension=2
        )
        self.norm = SparseLayerNorm(dim)
        self.pwconv1 = engine.MinkowskiLinear(dim, 4 * dim)
        self.pwconv2 = engine.MinkowskiLinear(4 * dim, dim)
        self.grn = nn.Module()
        self.grn.gamma = nn.Parameter(torch.zeros(1, 4 * dim))
        self.grn.beta = nn.Parameter(torch.zeros(1, 4 * dim))

    def forward(self, x):
        y = self.pwconv1(self.norm(self.dwconv(x)))
        y = like(y, gelu(y.F))
        norm = y.F.norm(dim=0, keepdim=True)
        response = norm / (norm.mean() + 1e-6)
        y = like(y, self.grn.gamma * (y.F * response) + self.grn.beta + y.F)
        return x + self.pwconv2(y)


def like(x, features: Tensor):
    return engine.SparseTensor(
        features,
        coordinate_map_key=x.coordinate_map_key,
        coordinate_manager=x.coordinate_manager,
    )


class SparseEncoder(nn.Module):
    def __init__(self, depths: tuple[int, ...], dims: tuple[int, ...]) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), nn.LayerNorm(dims[0], 1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in pairwise(dims):
            conv = engine.MinkowskiConvolution(
                before, after, kernel_size=2, stride=2, bias=True, dimension=2
            )
            norm = SparseLayerNorm(before)
            self.downsample_layers.append(nn.Sequential(norm, conv))
        self.stages = nn.ModuleList(
            nn.Sequential(*(SparseBlock(dim) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )

    def forward(self, picture: Tensor, mask: Tensor) -> Tensor:
        """Return the features of a picture's visible patches, ``(C, V)``."""
        conv, norm = self.downsample_layers[0]
        x = norm(conv(picture)[0].permute(1, 2, 0))
        shown = ~mask[0].repeat_interleave(8, 0).repeat_interleave(8, 1)
        places = shown.nonzero().int()
        batch = torch.zeros(len(places), 1, dtype=torch.int)
        x = engine.SparseTensor(x[shown], torch.cat((batch, places), 1))
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.downsample_layers[i](x))
        dense = x.dense(torch.Size((1, x.F.shape[1], *mask.shape[1:])))[0]
        return dense[0][:, ~mask[0]]


@needs_minkowski
def test_sparse_checkpoints_of_minkowski_engine():
    """Its modules name and shape the weights, and compute the features."""
    torch.manual_seed(0)
    theirs = nn.Module()
    theirs.encoder = SparseEncoder(**CUSTOM).eval()
    for param in theirs.parameters():
        nn.init.normal_(param, std=0.3)
    assert set(theirs.state_dict()) <= set(sparse()[1])
    # The decoder is of ordinary modules.
    decoder = {k: v for k, v in sparse()[1].items() if not k.startswith('encoder.')}
    weights = convert_weights({**theirs.state_dict(), **decoder}, 'ours').weights
    ours = backbone(out_indices=(3,), output_norm=False)
    part = {k.removeprefix('backbone.'): v for k, v in weights.items()}
    ours.load_state_dict({k: v for k, v in part.items() if not k.startswith('neck.')})

    picture = torch.randn(1, 3, 96, 128)
    mask = torch.rand(1, 3, 4) < 0.5
    expected = theirs.encoder(picture, mask)
    assert expected.std() > 0.1
    torch.testing.assert_close(
        ours(picture, mask)[0][0].T, expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.bin', '.safetensors'])
@pytest.mark.parametrize('target', TARGETS)
def test_files(target, suffix, tmp_path):
    weights = classifier('ours')
    torch.save({'state_dict': weights}, tmp_path / 'ours.pth')
    there = tmp_path / 'deeper' / f'there{suffix}'
    conversion = convert_checkpoint(tmp_path / 'ours.pth', there, target)
    assert [path.name for path in there.parent.iterdir()] == [there.name]
    assert_same(load_weights(there), conversion.weights)
    with pytest.raises(ValueError, match='is the checkpoint itself'):
        convert_checkpoint(there, there, 'ours')
    back = convert_checkpoint(there, tmp_path / 'ours.pth', 'ours')
    assert_same(load_weights(tmp_path / 'ours.pth'), back.weights)
    if target != 'transformers-backbone':
        assert_same(back.weights, weights)


@pytest.mark.parametrize(
    ('target', 'key'),
    [
        ('official', 'model'),
        ('ours', 'state_dict'),
        ('mmpretrain', 'state_dict'),
        ('timm', None),
        ('transformers', None),
    ],
)
def test_holders(target, key, tmp_path):
    torch.save(classifier('ours'), tmp_path / 'ours.pth')
    convert_checkpoint(tmp_path / 'ours.pth', tmp_path / 'there.pth', target)
    content = torch.load(tmp_path / 'there.pth')
    if key:
        assert set(content) == {key}
        content = content[key]
    assert_same(content, classifier(target))


def test_official_training_checkpoints_hold_arguments(tmp_path):
    path = tmp_path / 'checkpoint-99.pth'
    ours, theirs = sparse()
    more = dict(optimizer=dict(state={}), epoch=99, args=Namespace(mask_ratio=0.6))
    torch.save({'model': theirs, **more}, path)
    assert_same(convert_checkpoint(path, tmp_path / 'a.pth', 'ours').weights, ours)
    torch.save({'model': theirs, 'args': Path}, path)
    with pytest.raises(RuntimeError, match='Refused to load'):
        convert_checkpoint(path, tmp_path / 'b.pth', 'ours')
    # It is no ordinary checkpoint elsewhere.
    assert Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_failed_writing_leaves_the_old_file(suffix, tmp_path, monkeypatch):
    path = tmp_path / f'weights{suffix}'
    save_weights({'a': torch.ones(2)}, path)

    def fail(*args):
        raise OSError('no space left')

    monkeypatch.setattr(Path, 'replace', fail)
    with pytest.raises(OSError, match='no space'):
        save_weights({'a': torch.zeros(2)}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert_same(load_weights(path), {'a': torch.ones(2)})


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_others_may_read_what_is_written(suffix, tmp_path):
    path, usual = tmp_path / f'weights{suffix}', tmp_path / 'usual'
    usual.touch()
    save_weights({'a': torch.ones(2)}, path)
    assert path.stat().st_mode == usual.stat().st_mode


def test_safetensors_absent_or_broken(tmp_path, monkeypatch):
    path = tmp_path / 'weights.safetensors'
    path.write_bytes(b'no tensors at all')
    with pytest.raises(RuntimeError, match=r'weights\.safetensors \(17 bytes\)'):
        load_weights(path)
    with pytest.raises(FileNotFoundError, match=r'no checkpoint file .*none\.safe'):
        load_weights(tmp_path / 'none.safetensors')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ImportError, match=r'pip install safetensors.*or take a \.pth'):
        load_weights(path)


def without(pattern: str) -> Weights:
    return {k: v for k, v in classifier('timm').items() if not re.search(pattern, k)}


@pytest.mark.parametrize(
    ('weights', 'message'),
    [
        (
            {'conv1.weight': torch.ones(1), 'layer1.0.conv1.weight': torch.ones(1)},
            r"no ConvNeXt V2 .* 2 tensors in 'conv1', 'layer1', such as "
            r"'conv1.weight'; expected was one of\n  stages.0.0.dwconv.weight \(off",
        ),
        ({}, 'It holds 0 tensors'),
        (without('grn'), r'neither GRN, as .*, nor LayerScale, .* was .*grn\.weight'),
        (without('^stages.3'), r'stages have \[1, 2, 1, 0\] blocks; a whole'),
        (
            without(r'^stem\.0\.weight'),
            r"'timm' by its names.* without 'stem.0.weight'",
        ),
        (
            without(r'fc2\.bias'),
            r"without 'stages.0.*fc2.bias', .* and 3 more; a whole",
        ),
        (without(r'stages\.1\.blocks\.0'), r'\[1, 0, 1, 2\]'),
        (without(r'stages\.3\.blocks\.0\.conv_dw\.bias'), 'without .*conv_dw.bias'),
        (
            {**without('^$'), 'stages.1.blocks.7.conv_dw.weight': torch.ones(1)},
            "no ConvNeXt V2 has 'stages.1.blocks.7.conv_dw.weight'; a file of",
        ),
        (
            {**without('^$'), 'stages.2.blocks.0.norm.bias': torch.ones(9)},
            r"'stages.2.blocks.0.norm.bias' has the shape \(9,\).* need \(14,\)",
        ),
        (
            {**without('^$'), 'stem.0.weight': torch.ones(6)},
            r"'stem.0.weight' has the shape \(6,\).* need \(6, 3, 4, 4\)",
        ),
        (
            {**sparse()[1], 'encoder.stages.0.0.dwconv.kernel': torch.ones(9, 6)},
            r"kernel' has the shape \(9, 6\).* need \(6, 1, 7, 7\)",
        ),
    ],
    ids=range(12),
)
def test_what_is_no_convnextv2(weights, message):
    with pytest.raises(ValueError, match=f'(?s){message}'):
        convert_weights(weights, 'official')


def test_wrong_formats():
    with pytest.raises(ValueError, match="unknown format 'paddle'; give one of offic"):
        convert_weights(classifier('timm'), 'paddle')
    with pytest.raises(ValueError, match="unknown format 'official-sparse'; give one"):
        convert_weights(classifier('timm'), 'official-sparse')
    with pytest.raises(ValueError, match=r"not in .* 'official', .*the format 'timm'"):
        convert_weights(classifier('timm'), 'ours', 'official')


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ({'epoch': 3, 'args': 1}, "as 'model' or 'state_dict', but got epoch, args"),
        ({}, 'no weights; .* but got nothing'),
        ([1], 'a list, but no dict of tensors'),
    ],
)
def test_files_without_weights(content, message, tmp_path):
    torch.save(content, tmp_path / 'odd.pth')
    with pytest.raises(ValueError, match=rf'odd\.pth holds .*{message}'):
        convert_checkpoint(tmp_path / 'odd.pth', tmp_path / 'x.pth', 'ours')
    with pytest.raises(ValueError, match=r'x\.onnx ends in none of \.pth, \.pt'):
        convert_checkpoint(tmp_path / 'odd.pth', tmp_path / 'x.onnx', 'ours')
