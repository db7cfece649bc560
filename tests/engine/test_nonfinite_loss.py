"""Losses that are not finite, in real runs: the message, the stop, and no trace."""

import datetime
import re
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmcnv2.registry import HOOKS, MODELS

# Not relative, for this is run as a script too.
from tests.commands import run_tool

HOOK = dict(type='mmcnv2.NonFiniteLossHook')
FCMAE = dict(
    type='mmcnv2.FCMAE',
    data_preprocessor=dict(
        type='mmcnv2.FCMAEDataPreprocessor', mean=[0.0] * 3, std=[1.0] * 3
    ),
    backbone=dict(
        type='mmcnv2.ConvNeXtV2', arch=dict(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))
    ),
    neck=dict(type='mmcnv2.FCMAEDecoder', decoder_dim=8),
    head=dict(type='mmcnv2.FCMAEHead'),
)


class Numbers(Dataset):
    """Picture i of 32 x 32 pixels holds values about i."""

    metainfo: dict = {}  # noqa: RUF012

    broken: int | None = None

    def __init__(self, side: int = 32) -> None:
        self.side = side

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        picture = index + torch.rand(3, self.side, self.side, generator=generator)
        if index == self.broken:
            picture[0, 0, 0] = float('nan')
        sample = BaseDataElement(metainfo=dict(img_path=f'pictures/{index:02}.png'))
        return {'inputs': picture, 'data_samples': sample}


class AtRandom(nn.Module):
    """Every other time, at random, puts out infinity."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (torch.rand(()) < 0.5)


class Net(BaseModel):
    """With noise and running statistics, and a layer that gives infinity for some."""

    def __init__(self, broken: tuple[int, ...] = (), at_random: bool = False) -> None:
        super().__init__(FCMAE['data_preprocessor'])
        self.layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
        self.last = AtRandom() if at_random else nn.Identity()
        self.broken = broken

    def forward(self, inputs: Tensor, data_samples: list, mode: str) -> dict:
        x = self.last(self.layer(inputs.mean((2, 3))))
        # Constant, so that the gradients stay finite and training could go on.
        hit = any(int(x) in self.broken for x in inputs.nan_to_num().mean((1, 2, 3)))
        return {
            'loss_a': x.square().mean() + (float('inf') if hit else 0),
            'loss_b': [x.mean()],
            # No loss, and so nothing to stop for.
            'accuracy': x.new_tensor(float('nan')),
        }


def make_runner(
    folder: Path, model: Any, hook: dict | None = HOOK, side: int = 64
) -> Runner:
    """Train for ten iterations: pictures 0 and 1 in the first, and so on."""
    return Runner(
        model,
        str(folder),
        train_dataloader=dict(
            dataset=Numbers(side),
            batch_size=2,
            num_workers=0,
            collate_fn=pseudo_collate,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)),
        default_hooks=dict(checkpoint=None, logger=None),
        custom_hooks=[hook] if hook else [],
        randomness=dict(seed=0),
        experiment_name=uuid4().hex,
    )


def log_of(runner: Runner) -> str:
    return next(Path(runner.log_dir).glob('*.log')).read_text()


def test_names_iteration_pictures_and_layer_before_any_step(tmp_path):
    model = Net(broken=(7,))
    runner = make_runner(tmp_path, model)
    message = (
        r'^The loss of iteration 4 is not finite\.\nProcess 0: loss_a\. '
        r'All layers put out finite values, .*loss itself\. '
        r'Pictures: pictures/06.png, pictures/07.png\nTraining stops, .* of 1 iter'
    )
    with pytest.raises(FloatingPointError, match=message):
        runner.train()
    assert (runner.iter, model.layer[1].num_batches_tracked) == (3, 4)


@pytest.mark.parametrize('scale', [3e38, float('nan')])
def test_first_layer_of_a_pretraining(tmp_path, scale):
    torch.manual_seed(0)
    model = MODELS.build(FCMAE)
    model.init_weights()
    weights = model.backbone.stages[1][0].pwconv1.weight
    weights.data.fill_(scale)
    state = 'whose weights are not finite' if scale != scale else 'from finite weights'
    message = rf'backbone\.stages\.1\.0\.pwconv1 \(Linear\), {state}'
    with pytest.raises(FloatingPointError, match=message):
        make_runner(tmp_path, model).train()


def test_pixels_that_are_no_numbers(tmp_path):
    runner = make_runner(tmp_path, MODELS.build(FCMAE))
    runner.model.register_forward_pre_hook(
        lambda model, args, kwargs: (args, {**kwargs, 'inputs': kwargs['inputs'] / 0}),
        with_kwargs=True,
    )
    with pytest.raises(FloatingPointError, match=r'Pixels of the pictures .*00\.png'):
        runner.train()


def test_stops_after_so_many_in_a_row_and_tells_of_each_row(tmp_path):
    # Iterations 2, 3 and, in a row of three, 5, 6 and 7.
    model = Net(broken=(2, 4, 8, 10, 12))
    runner = make_runner(tmp_path, model, dict(HOOK, max_in_a_row=3))
    with pytest.raises(FloatingPointError, match=r'iteration 5 (.|\n)* of 3 iterat'):
        runner.train()
    assert runner.iter == 6
    log = log_of(runner)
    assert [log.count(f'loss of iteration {i} is') for i in range(1, 9)] == [
        *(0, 1, 0, 0, 1, 0, 0, 0)
    ]


def test_second_run_leaves_no_trace(tmp_path):
    ends = []
    for hook in (None, dict(HOOK, max_in_a_row=4)):
        torch.manual_seed(0)
        model = Net(broken=(2, 4, 8, 10, 12))
        make_runner(tmp_path, model, hook).train()
        ends.append(model.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_second_run_draws_the_same_random_numbers(tmp_path):
    runner = make_runner(tmp_path, Net(at_random=True), dict(HOOK, max_in_a_row=1))
    with pytest.raises(FloatingPointError, match=r'put out such values: last \(AtR'):
        runner.train()


def test_float16_in_which_the_papers_start_overflows(tmp_path):
    """Its steps would all be skipped, and the log say ``nan`` for 800 epochs."""
    init = dict(init_cfg=dict(type='mmcnv2.FCMAEInit'))
    backbone = dict(type='mmcnv2.ConvNeXtV2', arch='tiny', **init)
    neck = dict(type='mmcnv2.FCMAEDecoder', decoder_dim=8, **init)
    model = MODELS.build(dict(FCMAE, backbone=backbone, neck=neck))
    runner = make_runner(tmp_path, model, HOOK)
    message = r'neck\.proj \(Linear\), from finite(.|\n)*dtype=.bfloat16'
    with (
        torch.autocast('cpu', torch.float16),
        pytest.raises(FloatingPointError, match=message),
    ):
        runner.train()


def test_loss_scaler_gives_it_time(tmp_path):
    """The wrapper itself needs an accelerator, so here the scaler is all there is."""
    runner = make_runner(tmp_path, Net(broken=tuple(range(20))))
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.optim_wrapper.loss_scaler = None
    with pytest.raises(FloatingPointError, match=r'iteration 1 (.|\n)* of 10 iter'):
        runner.train()


@pytest.mark.parametrize('number', [0, -1])
def test_number_out_of_range(number):
    with pytest.raises(ValueError, match='max_in_a_row'):
        HOOKS.build(dict(HOOK, max_in_a_row=number))


class Meeting(nn.Module):
    """Communicates, as SyncBN does, which wants GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.detach().sum(0)
        torch.distributed.all_reduce(total)
        return x + 0 * total.nan_to_num()


def train_as_one_of_two(folder: Path, pixels: bool) -> None:
    """Run in each of two processes, by ``test_two_processes_stop_together``."""
    patience = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group('gloo', timeout=patience)
    # Only the second process meets it: it takes pictures 9 and 11 third.
    net = Net(broken=() if pixels else (11,))
    net.last = Meeting()
    runner = make_runner(folder, MMDistributedDataParallel(net))
    if pixels:
        runner.train_dataloader.dataset.broken = 11
    try:
        runner.train()
    except FloatingPointError as error:
        print(f'iter {runner.iter}: {error}')


@pytest.mark.parametrize(
    ('what', 'reason'),
    [('loss', r'loss_a\. .* Pictures'), ('pixels', r'loss_a, loss_b\. Pixels .*')],
)
def test_two_processes_stop_together(what, reason, tmp_path):
    output = run_tool([__file__, str(tmp_path), what], tmp_path, processes=2).stdout
    told = rf'iter 2: The loss of iteration 3 is not finite\.\nProcess 1: {reason}'
    told += r': pictures/09\.png, pictures/11\.png\n'
    assert len(re.findall(told, output)) == 2, output
    assert 'Process 0' not in output


if __name__ == '__main__':
    train_as_one_of_two(Path(sys.argv[1]), sys.argv[2] == 'pixels')
