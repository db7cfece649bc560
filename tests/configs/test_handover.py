"""Pre-trained weights reach a detector and a segmentor by one line of config."""

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from .conftest import small


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory, scenes, ade):
    folder = tmp_path_factory.mktemp('pretrained')
    cfg = small('demo/fcmae_convnextv2-atto_demo.py', folder, scenes, ade)
    init_default_scope(cfg.default_scope)
    Runner.from_cfg(cfg).train()
    return folder / 'epoch_1.pth'


@pytest.mark.parametrize(
    'recipe',
    [
        'demo/mask-rcnn_convnextv2-atto_fpn_fcmae-pretrained_demo.py',
        'demo/upernet_convnextv2-atto_fcmae-pretrained_demo.py',
    ],
)
def test_every_weight_but_the_output_norms_arrives(
    recipe, tmp_path, scenes, ade, pretrained
):
    cfg = small(recipe, tmp_path, scenes, ade)
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=str(pretrained), prefix='backbone.'
    )
    # Steps that change nothing: what training starts from is there at its end.
    cfg.optim_wrapper.optimizer.update(lr=0.0, weight_decay=0.0)
    init_default_scope(cfg.default_scope)
    runner = Runner.from_cfg(cfg)
    runner.train()

    weights = {
        name.removeprefix('backbone.'): value
        for name, value in torch.load(pretrained, weights_only=True)[
            'state_dict'
        ].items()
        if name.startswith('backbone.')
    }
    found = runner.model.backbone.state_dict()
    output_norms = {f'norm{i}.{kind}' for i in range(4) for kind in ('weight', 'bias')}
    assert set(found) == set(weights) | output_norms
    for name, value in weights.items():
        assert torch.equal(found[name], value), name
