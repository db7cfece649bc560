"""The hook in real runs of FCMAE: what it logs, and that it leaves no trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset

from mmcnv2.evaluation import feature_diversity
from mmcnv2.models import ConvNeXtV2

BLOCKS = ['stages.0.0', 'stages.1.0', 'stages.2.0', 'stages.3.0']
TAGS = ('feature_distance', 'dead_channels', 'saturated_channels')
MODEL = dict(
    type='mmcnv2.FCMAE',
    data_preprocessor=dict(
        type='mmcnv2.FCMAEDataPreprocessor', mean=[0.0] * 3, std=[1.0] * 3
    ),
    neck=dict(type='mmcnv2.FCMAEDecoder', decoder_dim=8),
    head=dict(type='mmcnv2.FCMAEHead'),
)
BACKBONE = dict(
    type='mmcnv2.ConvNeXtV2',
    arch=dict(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8)),
    # Random numbers are drawn in every block.
    drop_path_rate=0.3,
)


class Noise(Dataset):
    metainfo: dict = {}  # noqa: RUF012

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        picture = torch.randn(3, 96, 96, generator=generator)
        return {'inputs': picture, 'data_samples': BaseDataElement()}


def run(
    folder: Path,
    hook: dict | None,
    backend: str = 'LocalVisBackend',
    **backbone: Any,
) -> Runner:
    """Train for six iterations."""
    runner = Runner(
        {**MODEL, 'backbone': {**BACKBONE, **backbone}},
        str(folder),
        train_dataloader=dict(
            dataset=Noise(),
            batch_size=2,
            num_workers=0,
            collate_fn=pseudo_collate,
            sampler=dict(type='DefaultSampler', shuffle=True),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.01), accumulative_counts=2
        ),
        default_hooks=dict(checkpoint=None, logger=None),
        custom_hooks=[dict(type='mmcnv2.FeatureDiversityHook', **hook)] if hook else [],
        visualizer=dict(type='Visualizer', vis_backends=[dict(type=backend)]),
        experiment_name=f'{folder.parent.name}_{folder.name}',
        randomness=dict(seed=3),
    )
    runner.train()
    return runner


def logged(folder: Path) -> list[dict[str, float]]:
    [file] = folder.rglob('scalars.json')
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Hold what each block of the encoder put out, with two pictures in a batch."""
    taken: list[torch.Tensor] = []
    run_block = ConvNeXtV2._run

    def run_and_take(self: ConvNeXtV2, *args: Any) -> torch.Tensor:
        taken.append(run_block(self, *args))
        return taken[-1]

    monkeypatch.setattr(ConvNeXtV2, '_run', run_and_take)
    return taken


@pytest.mark.parametrize('with_cp', [False, True])
def test_logs_the_metric(tmp_path, outputs, with_cp):
    run(tmp_path, dict(interval=2), with_cp=with_cp)
    assert len(outputs) == 6 * len(BLOCKS)
    found = logged(tmp_path)
    assert [line['step'] for line in found] == [2, 4, 6]
    for line in found:
        start = (line.pop('step') - 1) * len(BLOCKS)
        expected = {}
        for name, output in zip(BLOCKS, outputs[start:], strict=False):
            means = feature_diversity(output.detach()).mean(0).tolist()
            expected |= {
                f'{tag}/{name}': mean for tag, mean in zip(TAGS, means, strict=True)
            }
        assert line == pytest.approx(expected, abs=1e-6)
    assert 0.1 < found[0]['feature_distance/stages.0.0'] < 0.6


@pytest.mark.parametrize(
    ('layers', 'tolerance'),
    [
        (['stages.*.*'], dict(rtol=0, atol=0)),
        # Rounded otherwise: GRN is not folded into what follows it.
        (['stages.*.*.grn'], dict(rtol=1e-3, atol=1e-4)),
    ],
)
def test_training_stays_as_it_is(layers, tolerance, tmp_path):
    plain = run(tmp_path / 'plain', None)
    random_state = torch.get_rng_state()
    watched = run(tmp_path / 'watched', dict(interval=1, layers=layers))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(logged(tmp_path / 'watched')) == 6
    weights = plain.model.state_dict()
    assert weights.keys() == watched.model.state_dict().keys()
    for name, value in watched.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], **tolerance)
    # It starts at zero.
    assert weights['backbone.stages.0.0.grn.gamma'].all()
    for each in watched.model.modules():
        assert not each._forward_hooks
        assert each.training


def test_tensorboard(tmp_path):
    hook = dict(interval=4, layers=['stages.2.0', 'stages.0.0.act'])
    run(tmp_path, hook, backend='TensorboardVisBackend')
    [events] = tmp_path.rglob('events.out.tfevents.*')
    log = EventAccumulator(str(events)).Reload()
    layers = ('stages.0.0.act', 'stages.2.0')
    assert set(log.Tags()['scalars']) == {f'{t}/{n}' for t in TAGS for n in layers}
    assert [each.step for each in log.Scalars('dead_channels/stages.2.0')] == [4]


@pytest.mark.parametrize('interval', [0, -5])
def test_interval_that_is_none(tmp_path, interval):
    with pytest.raises(ValueError, match=f'interval is {interval}; give a positive'):
        run(tmp_path, dict(interval=interval))


def test_layer_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"no layer to measure is named 'stages\.0'"):
        run(tmp_path, dict(layers=['stages.0']))


class Scale(BaseModel):
    """A model without a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs: list, data_samples: list, mode: str) -> dict:
        return {'loss': self.weight.square()}


def test_model_without_backbone(tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, 'build_model', lambda self, model: Scale())
    with pytest.raises(ValueError, match='Scale has none; remove the hook'):
        run(tmp_path, dict(interval=1))
