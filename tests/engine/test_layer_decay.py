import pytest
from mmdet.engine.optimizers.layer_decay_optimizer_constructor import (
    get_layer_id_for_convnext,
)
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmseg.engine.optimizers.layer_decay_optimizer_constructor import (
    get_stage_id_for_convnext,
)
from torch import nn

from mmcnv2.engine.layer_decay import layer_group
from mmcnv2.models import ARCHITECTURES, ConvNeXtV2

# Every published depth, at a width that builds at once.
DEPTHS = {name: arch['depths'] for name, arch in ARCHITECTURES.items()}
# The numbers of layers that mmdet's and mmseg's own configs give for these depths.
NUM_LAYERS = {(3, 3, 9, 3): 6, (3, 3, 27, 3): 12}


class Model(nn.Module):
    def __init__(self, depths=(3, 3, 9, 3), use_grn=True):
        super().__init__()
        arch = dict(depths=depths, dims=(4, 6, 8, 10))
        self.backbone = ConvNeXtV2(arch, use_grn=use_grn)
        self.head = nn.Conv2d(10, 3, 1)


def optim_wrapper_cfg(**paramwise_cfg):
    return dict(
        type='OptimWrapper',
        constructor='mmcnv2.LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05),
        paramwise_cfg=paramwise_cfg,
    )


def settings(model, **paramwise_cfg):
    """Return the learning rate and weight decay of each parameter, by name."""
    wrapper = build_optim_wrapper(model, optim_wrapper_cfg(**paramwise_cfg))
    names = {param: name for name, param in model.named_parameters()}
    rows = [
        (names[param], (group['lr'], group['weight_decay']))
        for group in wrapper.optimizer.param_groups
        for param in group['params']
    ]
    assert len(rows) == len(dict(rows))  # no parameter twice
    return dict(rows)


@pytest.mark.parametrize('use_grn', [True, False], ids=['V2', 'V1'])
@pytest.mark.parametrize('depths', NUM_LAYERS, ids=str)
@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
def test_is_the_published_rule(depths, decay_type, use_grn):
    model = Model(depths, use_grn)
    num_layers = NUM_LAYERS[depths]
    found = settings(model, decay_rate=0.9, decay_type=decay_type)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, param in model.named_parameters():
        if decay_type == 'layer_wise':
            layer = get_layer_id_for_convnext(name, num_layers)
        else:
            layer = get_stage_id_for_convnext(name, num_layers + 2)
        spared = param.dim() == 1 or name.endswith(('.bias', '.gamma', '.beta'))
        lr = 1e-2 * 0.9 ** (num_layers + 1 - layer)
        assert found[name] == (pytest.approx(lr), 0.0 if spared else 0.05), name


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_groups_of_every_size(arch):
    """The stem 0, stages 1 and 2, three blocks a group, the last stage, the rest."""
    depths = DEPTHS[arch]
    last = {'atto': 5, 'femto': 5, 'pico': 5, 'nano': 6, 'tiny': 6}.get(arch, 12)
    groups = [
        ('downsample_layers.0.0.weight', 0),
        ('stages.0.1.grn.gamma', 1),
        ('downsample_layers.1.0.bias', 2),
        ('stages.1.0.dwconv.weight', 2),
        ('downsample_layers.2.1.weight', 3),
        ('stages.2.2.pwconv1.weight', 3),
        ('stages.2.3.pwconv1.weight', 4),
        (f'stages.2.{depths[2] - 1}.norm.bias', last - 1),
        ('downsample_layers.3.1.weight', last),
        ('stages.3.0.pwconv2.bias', last),
        ('norm2.weight', last + 1),
    ]
    for name, group in groups:
        assert layer_group(name, depths, 'layer_wise') == group, name


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_each_block_a_group(arch):
    """All in the order of the network; a downsampling layer goes with its block."""
    depths = DEPTHS[arch]
    group = 0
    for stage, depth in enumerate(depths):
        for block in range(depth):
            group += 1
            names = [f'stages.{stage}.{block}.grn.gamma']
            if block == 0:
                names += [f'downsample_layers.{stage}.{i}.weight' for i in (0, 1)]
            for name in names:
                assert layer_group(name, depths, 'block_wise') == group, name
    assert layer_group('norm3.bias', depths, 'block_wise') == group + 1
    counts = {'atto': 12, 'femto': 12, 'pico': 12, 'nano': 14, 'tiny': 18}
    assert group == counts.get(arch, 36)


def test_rates_of_blocks():
    found = settings(Model((1, 2, 1, 2)), decay_rate=0.5, decay_type='block_wise')
    rates = {name: lr for name, (lr, _) in found.items()}
    assert rates['head.weight'] == rates['backbone.norm3.weight'] == 1e-2
    assert rates['backbone.stages.3.1.norm.bias'] == pytest.approx(1e-2 / 2)
    assert rates['backbone.stages.3.0.norm.bias'] == pytest.approx(1e-2 / 4)
    assert rates['backbone.downsample_layers.3.1.bias'] == pytest.approx(1e-2 / 4)
    assert rates['backbone.downsample_layers.0.0.bias'] == pytest.approx(1e-2 / 64)


def test_grn_is_not_decayed():
    found = settings(Model(), decay_rate=1.0)
    assert found['backbone.stages.2.0.grn.gamma'] == (1e-2, 0.0)
    assert found['backbone.stages.2.0.grn.beta'] == (1e-2, 0.0)
    assert found['backbone.stages.2.0.pwconv1.weight'] == (1e-2, 0.05)


def test_frozen_parameters_are_left_out():
    model = Model()
    model.head.requires_grad_(False)
    found = settings(model, decay_rate=0.9)
    assert found
    assert not any(name.startswith('head.') for name in found)


def test_logs_its_groups_once(tmp_path):
    log = tmp_path / 'log'
    MMLogger.get_instance('layer_decay_test', log_file=str(log))
    settings(Model(), decay_rate=0.5)
    (row,) = [line for line in log.read_text().splitlines() if 'layer_7_decay' in line]
    assert row.split() == ['layer_7_decay', '0.01', '1.0000', '0.05', '30']


@pytest.mark.parametrize(
    ('paramwise_cfg', 'message'),
    [
        (dict(decay_type='layer_wise'), "holds 'decay_rate'"),
        (dict(decay_rate=0.9, layers=3), "but got .*'layers'"),
        (dict(decay_rate=0.0), r'decay_rate is 0.0; give a number in \(0, 1\]'),
        (dict(decay_rate='high'), "decay_rate is 'high'; give a number"),
        (dict(decay_rate=0.9, decay_type='block'), "unknown decay_type 'block'"),
        (dict(decay_rate=0.9, num_layers=12), 'make 6 groups; leave num_layers out'),
    ],
)
def test_wrong_settings(paramwise_cfg, message):
    with pytest.raises(ValueError, match=message):
        settings(Model(), **paramwise_cfg)


def test_backbones_of_different_depths_keep_their_own_rates():
    deep, shallow = Model((3, 3, 27, 3)), Model((3, 3, 9, 3))
    both = settings(nn.ModuleDict(dict(deep=deep, shallow=shallow)), decay_rate=0.5)
    for name, model in (('deep', deep), ('shallow', shallow)):
        for key, value in settings(model, decay_rate=0.5).items():
            assert both[f'{name}.{key}'] == pytest.approx(value), key


def test_needs_a_learning_rate_and_a_weight_decay():
    cfg = optim_wrapper_cfg(decay_rate=0.9)
    del cfg['optimizer']['weight_decay']
    with pytest.raises(ValueError, match='the optimizer needs weight_decay'):
        build_optim_wrapper(Model(), cfg)


def test_needs_our_backbone():
    with pytest.raises(ValueError, match='Linear has none'):
        settings(nn.Linear(2, 2), decay_rate=0.9)
