"""Backbones that start from files of every format, and from files that do not fit."""

import pytest
import torch
from torch import Tensor, nn

from mmcnv2.engine.conversion import TARGETS, convert_checkpoint, convert_weights
from mmcnv2.models import ConvNeXtV2

from .test_conversion import CUSTOM, assert_same, backbone, classifier, sparse


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {f'backbone.{name}': value for name, value in model.state_dict().items()}


def started(path, arch=CUSTOM, prefix=None, adapt=None, **kwargs) -> nn.Module:
    # As a config has it; what is left at its default is left out.
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    init_cfg.update(prefix=prefix) if prefix else None
    init_cfg.update({f'adapt_{adapt}': True}) if adapt else None
    model = ConvNeXtV2(arch, init_cfg=init_cfg, **kwargs)
    model.init_weights()
    return model


@pytest.mark.parametrize('prefix', [None, 'backbone.'])
@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_every_format(target, suffix, prefix, tmp_path, log):
    path = tmp_path / f'weights{suffix}'
    torch.save({'state_dict': classifier('ours')}, tmp_path / 'ours.pth')
    convert_checkpoint(tmp_path / 'ours.pth', path, target)
    model = started(path, prefix=prefix, out_indices=(3,))
    assert_same(model.state_dict(), backbone(out_indices=(3,)).state_dict())
    count = len(model.state_dict())
    assert f'(in the format {target!r}): {count} tensors loaded, missing: none' in (
        log.text
    )


def test_sparse_training_checkpoints(tmp_path, log):
    ours, theirs = sparse()
    torch.save({'model': theirs}, tmp_path / 'checkpoint-99.pth')
    model = started(tmp_path / 'checkpoint-99.pth')
    for name, value in model.state_dict().items():
        if not name.startswith('norm'):
            assert torch.equal(value, ours[f'backbone.{name}']), name
    assert 'missing: norm0.weight, norm0.bias, norm1.weight' in log.text


def test_backbones_by_themselves(tmp_path):
    """As ``torch.save(model.backbone.state_dict())`` leaves them, or within others."""
    source = backbone()
    torch.save(source.state_dict(), tmp_path / 'bare.pth')
    assert_same(started(tmp_path / 'bare.pth').state_dict(), source.state_dict())
    teacher = {f'teacher.{k}': v for k, v in source.state_dict().items()}
    torch.save({**teacher, 'backbone.x': torch.ones(1)}, tmp_path / 'teacher.pth')
    for prefix in ('teacher.', 'teacher'):
        model = started(tmp_path / 'teacher.pth', prefix=prefix)
        assert_same(model.state_dict(), source.state_dict())
    with pytest.raises(
        ValueError, match=r"begins with 'techer\.', but with teacher, ba"
    ):
        started(tmp_path / 'teacher.pth', prefix='techer.')


def test_what_is_left_out_is_told(tmp_path, log):
    torch.save({'state_dict': backbone().state_dict()}, tmp_path / 'whole.pth')
    model = started(tmp_path / 'whole.pth', out_indices=(0, 2))
    for name, value in model.state_dict().items():
        assert torch.equal(value, backbone().state_dict()[name]), name
    assert 'unexpected: norm1.weight, norm1.bias, norm3.weight' in log.text
    assert 'stages.3.1.pwconv2.bias' in log.text


@pytest.mark.parametrize('channels', [1, 2, 4, 7])
def test_stem_for_other_pictures(channels, tmp_path):
    torch.save(backbone().state_dict(), tmp_path / 'colours.pth')
    model = started(tmp_path / 'colours.pth', adapt='stem', in_channels=channels)
    colours = backbone().downsample_layers[0][0]
    stem = model.downsample_layers[0][0]
    # A grey picture looks the same in all of its channels, however many there are.
    grey = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    if channels == 1:
        expected = colours(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(stem(grey), expected)
    for i in range(channels if channels > 1 else 0):
        torch.testing.assert_close(
            stem.weight[:, i], colours.weight[:, i % 3] * 3 / channels
        )
    rest = backbone(in_channels=channels).state_dict()
    for name, value in model.state_dict().items():
        assert name == 'downsample_layers.0.0.weight' or torch.equal(value, rest[name])


def test_stem_is_timms(tmp_path):
    adapt = pytest.importorskip('timm.models', reason='timm is absent')
    torch.save(backbone().state_dict(), tmp_path / 'colours.pth')
    weight = backbone().downsample_layers[0][0].weight
    for channels in (1, 3, 4, 8):
        model = started(tmp_path / 'colours.pth', adapt='stem', in_channels=channels)
        expected = adapt.adapt_input_conv(channels, weight.detach().clone())
        found = model.downsample_layers[0][0].weight
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def features(model: nn.Module) -> list[Tensor]:
    picture = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    return list(model.eval()(picture))


def test_grn_put_in_changes_nothing_at_first(tmp_path, log):
    """It is the identity, and LayerScale is in the layer before it."""
    source = backbone(use_grn=False)
    torch.save(source.state_dict(), tmp_path / 'v1.pth')
    model = started(tmp_path / 'v1.pth', adapt='grn')
    grn = [value for name, value in model.state_dict().items() if '.grn.' in name]
    assert len(grn) == 12
    assert not torch.cat([value.flatten() for value in grn]).any()
    torch.testing.assert_close(features(model), features(source))
    assert (
        'GRN is new: 12 tensors, the identity at first. LayerScale, 6 tensors, is '
        'multiplied into pwconv2'
    ) in log.text
    count = len(source.state_dict()) - 6
    assert f'{count} tensors loaded, missing: none, unexpected: none' in log.text


def test_grn_taken_out_changes_nothing_else(tmp_path, log):
    source = backbone()
    torch.save(convert_weights(whole(source), 'timm').weights, tmp_path / 'v2.pth')
    model = started(tmp_path / 'v2.pth', adapt='grn', use_grn=False, out_indices=(3,))
    scales = [v for name, v in model.state_dict().items() if name.endswith('.gamma')]
    assert len(scales) == 6
    assert all((scale == 1).all() for scale in scales)
    for name, param in source.named_parameters():
        nn.init.zeros_(param) if '.grn.' in name else None
    torch.testing.assert_close(features(model)[-1], features(source)[-1])
    assert 'GRN is left out: 12 tensors. LayerScale is new: 6 tensors, one' in log.text


def test_adapting_what_fits_changes_nothing(tmp_path, log):
    for use_grn in (True, False):
        source = backbone(use_grn=use_grn)
        torch.save(source.state_dict(), tmp_path / 'weights.pth')
        model = started(tmp_path / 'weights.pth', adapt='grn', use_grn=use_grn)
        assert_same(model.state_dict(), source.state_dict())
    assert 'LayerScale' not in log.text


def test_checkpoints_that_do_not_fit(tmp_path):
    torch.save(backbone().state_dict(), tmp_path / 'custom.pth')
    with pytest.raises(ValueError, match=r'V2 of atto .* that of depths \(1, 2'):
        started(tmp_path / 'custom.pth', arch='atto')
    with pytest.raises(ValueError, match=r'of 4 channels, .* set adapt_stem=True'):
        started(tmp_path / 'custom.pth', in_channels=4)
    with pytest.raises(ValueError, match=r'without GRN \(V1\) for .* adapt_grn=True'):
        started(tmp_path / 'custom.pth', use_grn=False)
    torch.save({'conv1.weight': torch.ones(2)}, tmp_path / 'resnet.pth')
    with pytest.raises(ValueError, match=r"start .* from .*resnet\.pth: .* 'conv1'"):
        started(tmp_path / 'resnet.pth')
    with pytest.raises(FileNotFoundError, match=r'no checkpoint file .*none\.pth'):
        started(tmp_path / 'none.pth')


def test_loads_last(tmp_path):
    """As in MMEngine, whatever the order of several initialisers."""
    torch.save(backbone().state_dict(), tmp_path / 'weights.pth')
    init_cfg = [
        dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth')),
        dict(type='Constant', layer='Conv2d', val=7.0),
    ]
    model = ConvNeXtV2(CUSTOM, init_cfg=init_cfg)
    model.init_weights()
    assert_same(model.state_dict(), backbone().state_dict())
