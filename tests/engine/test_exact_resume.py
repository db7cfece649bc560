"""Draws that depend on their place alone, and loaders that go on anywhere."""

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import BatchSampler, DataLoader

import mmcnv2  # noqa: F401
from mmcnv2.engine.exact_resume import (
    ExactResumeHook,
    ResumableBatchSampler,
    SeededBatch,
    seed_draws,
)

BATCHES = dict(type=BatchSampler, drop_last=True)


class Draws:
    """Samples that are draws, of each kind one."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple:
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def sampler_of(kind: type, seed: int = 3) -> ResumableBatchSampler:
    return ResumableBatchSampler(kind(Draws(), seed=seed), 2, BATCHES)


def read(
    kind: type, skip: int, count: int, workers: int = 0, persistent: bool = False
) -> list:
    """Read ``count`` batches after ``skip``, in a run that begins at iteration 10."""
    sampler = sampler_of(kind)
    sampler.start((0, 0), 10 + skip, skip, endless=True)
    loader = DataLoader(
        Draws(),
        batch_sampler=sampler,
        collate_fn=list,
        num_workers=workers,
        persistent_workers=persistent,
    )
    return [batch for _, batch in zip(range(count), loader, strict=False)]


def test_draws_depend_on_their_place() -> None:
    def draw(*place: int) -> tuple:
        seed_draws(*place)
        return Draws()[0]

    places = [(0,), (0, 0), (0, 1), (1, 0), (0, 1, 0)]
    draws = [draw(*place) for place in places]
    assert draws == [draw(*place) for place in places]
    for kind in (1, 2, 3):
        assert len({each[kind] for each in draws}) == len(places)


def test_processes_draw_differently() -> None:
    def draw(rank: int, iteration: int) -> float:
        runner = SimpleNamespace(seed=3, rank=rank, iter=iteration)
        ExactResumeHook().before_train_iter(runner, 0)
        return torch.rand(()).item()

    assert len({draw(rank, i) for rank in range(4) for i in range(3)}) == 12
    assert draw(1, 2) == draw(1, 2)


@pytest.mark.parametrize('kind', [DefaultSampler, InfiniteSampler])
def test_a_loader_goes_on_anywhere(kind: type) -> None:
    whole = read(kind, 0, 8)
    assert len({sample for batch in whole for sample in batch}) == 16
    for skip in (1, 3, 5):
        assert read(kind, skip, 3) == whole[skip : skip + 3]


@pytest.mark.parametrize('persistent', [False, True])
def test_workers_draw_what_one_process_does(persistent: bool) -> None:
    whole = read(DefaultSampler, 0, 5)
    assert read(DefaultSampler, 2, 3, workers=2, persistent=persistent) == whole[2:5]


def test_each_pass_has_an_order_of_its_own() -> None:
    passes = read(DefaultSampler, 0, 6)
    orders = [
        [sample[0] for batch in part for sample in batch]
        for part in (passes[:3], passes[3:])
    ]
    assert orders[0] != orders[1]
    expected = DefaultSampler(Draws(), seed=3)
    expected.set_epoch(1)
    assert orders[1] == [*expected][:6]


def test_one_pass_by_epochs() -> None:
    sampler = sampler_of(DefaultSampler)
    assert len(sampler) == 3
    sampler.start((0, 0), 10, 1)
    assert len([*sampler]) == 2
    sampler.start((0, 0), 12, 3)
    assert [*sampler] == []


def test_nothing_comes_before_the_start() -> None:
    sampler = sampler_of(InfiniteSampler)
    assert [*sampler] == []
    sampler.start((0, 0), 0, 0)
    first = next(iter(sampler))
    generator = torch.Generator().manual_seed(3)
    assert [*first] == torch.randperm(7, generator=generator)[:2].tolist()


def test_sending_a_batch_to_a_worker_draws_nothing() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    batch = pickle.loads(pickle.dumps(SeededBatch([4, 2], (0, 1))))
    assert random.random() == expected
    assert [*batch] == [4, 2]
    assert (len(batch), batch.place) == (2, (0, 1))
