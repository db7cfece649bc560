"""Runs that go on as if nothing had happened.

A random draw here depends on the seed and on where in the run it stands, and not on the
draws before it. So a run that was killed and resumed draws what it would have drawn,
and there is no state of a random generator to store.
"""

import itertools
import os
import random
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dataset import worker_init_fn
from mmengine.dist import all_reduce_params, get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import EpochBasedTrainLoop as _EpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, Sampler

from ..registry import FUNCTIONS, HOOKS, LOOPS
from .runner_state import is_between_steps, unwrapped

# What the message hub holds goes into checkpoints.
_DONE = 'batches_of_epoch_done'
_ORDER_SEED = 'sampler_seed'
_VALIDATED = 'iter_of_last_validation'

_LOOPS_BY_EPOCHS = (
    _EpochBasedTrainLoop,
    'EpochBasedTrainLoop',
    'mmengine.EpochBasedTrainLoop',
)


def seed_draws(*place: int) -> None:
    """Make what Python, numpy and torch draw next depend on a place in a run alone.

    Args:
        *place: The seed of the run, and numbers that no other place has.
    """
    # It takes a number that is not there for a zero.
    sequence = np.random.SeedSequence((len(place), *place))
    python, numpy, pytorch = sequence.generate_state(3)
    random.seed(int(python))
    np.random.seed(numpy)
    torch.manual_seed(int(pytorch))


class SeededBatch(list):
    """Indices of a batch; whoever reads them draws for each what its place says.

    PyTorch's loader reads samples by ``[dataset[i] for i in batch]``, in whichever
    process. So each has draws of its own, whatever the data set and its wrappers.

    Args:
        indices: Of the samples.
        place: As for :func:`seed_draws`; the number in the batch is added.
    """

    def __init__(self, indices: Iterable[Any], place: tuple[int, ...]) -> None:
        super().__init__(indices)
        self.place = place

    def __iter__(self) -> Iterator[Any]:
        """Yield the indices."""
        for number, index in enumerate(super().__iter__()):
            seed_draws(*self.place, number)
            yield index

    def __reduce__(self) -> tuple:
        """Reach a worker without a draw being seeded in this process."""
        return type(self), ([*super().__iter__()], self.place)


class ResumableBatchSampler(Sampler):
    """Batches of another batch sampler that know their places, from any of them on.

    It yields nothing before :meth:`start`: MMEngine's loop by iterations begins to read
    when it is built, which is before a checkpoint says where to go on.

    Args:
        sampler: MMEngine's, of single samples.
        batch_size: Samples of a batch.
        batches: Config of the other one.
    """

    def __init__(self, sampler: Sampler, batch_size: int, batches: dict) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.batches = DATA_SAMPLERS.build(
            batches, default_args=dict(sampler=sampler, batch_size=batch_size)
        )
        self._started = False

    def start(
        self, place: tuple[int, ...], iteration: int, skip: int, endless: bool = False
    ) -> None:
        """Say where the next pass begins.

        Args:
            place: Where the run stands but for the iteration.
            iteration: Of the first batch to be read.
            skip: Number of batches before it. They are counted, not read.
            endless: Whether to begin anew at the end, in another order.
        """
        self._started = True
        self._place, self._iteration = place, iteration
        self._skip, self._endless = skip, endless

    def __len__(self) -> int:
        """Count the batches of a pass."""
        return len(self.batches)

    def __iter__(self) -> Iterator[SeededBatch]:
        """Yield the batches that are left."""
        if not self._started:
            return
        left = itertools.islice(self._all(), self._skip, None)
        for iteration, batch in enumerate(left, self._iteration):
            yield SeededBatch(batch, (*self._place, iteration))

    def _all(self) -> Iterator[list]:
        yield from self.batches
        for epoch in itertools.count(1) if self._endless else ():
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            yield from self.batches


@LOOPS.register_module()
class EpochBasedTrainLoop(_EpochBasedTrainLoop):
    """MMEngine's, which after a resume within an epoch counts on from there."""

    def run_epoch(self) -> None:
        """Iterate over what is left of an epoch."""
        self._done = self.runner.message_hub.get_info(_DONE, 0)
        super().run_epoch()

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Iterate one batch.

        Args:
            idx: Its number among those read.
            data_batch: The batch.
        """
        super().run_iter(self._done + idx, data_batch)


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Let a resumed run do what it would have done; see :func:`make_resumable`.

    Each iteration draws what its number says, whichever came before. The loader goes on
    at the next batch, also within an epoch, and nothing is read to get there. Gradients
    that have not led to a step yet, and the seed of the order of samples, are part of
    checkpoints. A validation that was due right after the checkpoint takes place.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._gradients: dict[str, torch.Tensor] = {}
        self._owes_validation = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take out the gradients, which there is no use for but in a resumed run."""
        self._gradients = checkpoint.pop('gradients', {}) if runner._resume else {}

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the gradients, if a step is still to come of them."""
        if 'optimizer' in checkpoint and _has_gradients(runner):
            checkpoint['gradients'] = {
                name: param.grad.cpu()
                for name, param in unwrapped(runner.model).named_parameters()
                if param.grad is not None
            }

    def before_train(self, runner: Runner) -> None:
        """Go on from what was loaded."""
        for name, param in unwrapped(runner.model).named_parameters():
            if name in self._gradients:
                param.grad = self._gradients[name].to(param.device)
        self._gradients = {}
        self._owes_validation = _validation_is_due(runner)
        hub, order = runner.message_hub, runner.train_dataloader.batch_sampler.sampler
        # Without a seed in the config each start has another.
        if hasattr(order, 'seed'):
            order.seed = hub.get_info(_ORDER_SEED, order.seed)
            hub.update_info(_ORDER_SEED, int(order.seed))
        if _is_by_iterations(runner):
            _start_loader(runner)

    def before_train_epoch(self, runner: Runner) -> None:
        """Start the epoch, or what is left of it."""
        self._validate_if_owed(runner)
        if not _is_by_iterations(runner):
            done = runner.message_hub.get_info(_DONE, 0)
            runner.train_dataloader.batch_sampler.start(
                _place(runner), runner.iter, skip=done
            )

    def before_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict[str, Any] | None = None,
    ) -> None:
        """Draw by the number of the iteration."""
        _seed_iteration(runner)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict[str, Any] | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Count the batches of the epoch."""
        hub = runner.message_hub
        hub.update_info(_DONE, hub.get_info(_DONE, 0) + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        """Begin to count anew."""
        runner.message_hub.update_info(_DONE, 0)

    def before_val(self, runner: Runner) -> None:
        """Draw by the number of the iteration."""
        _seed_iteration(runner)

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Take note of the validation."""
        runner.message_hub.update_info(_VALIDATED, runner.iter)

    def after_train(self, runner: Runner) -> None:
        """Validate at last, if training was over and the validation was not."""
        self._validate_if_owed(runner)

    def _validate_if_owed(self, runner: Runner) -> None:
        if self._owes_validation:
            self._owes_validation = False
            runner.val_loop.run()


def share_gradients(runner: Runner) -> None:
    """Average gradients over all processes, of which one alone writes checkpoints.

    That concerns accumulated ones. Their step stays the same but for rounding.

    Args:
        runner: To be called in all of its processes.
    """
    if not runner.distributed or not _has_gradients(runner):
        return
    params = [param for param in runner.model.parameters() if param.requires_grad]
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    all_reduce_params([param.grad for param in params], op='mean')


@FUNCTIONS.register_module()
def start_worker(worker_id: int, **kwargs: Any) -> None:
    """Let a loader worker outlive a SIGTERM that is not from its parent.

    A cluster may send it to all processes, and a run whose workers are gone has no end
    but an error.

    Args:
        worker_id: Number of the worker.
        **kwargs: For MMEngine's ``worker_init_fn``.
    """
    worker_init_fn(worker_id, **kwargs)
    # Not on macOS.
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def make_resumable(runner: Runner) -> None:
    """Make a runner's training exactly resumable, whatever its config.

    The config itself, which is stored, stays as it is.

    Args:
        runner: One that has not begun to train.
    """
    for loader in (runner._train_dataloader, runner._val_dataloader):
        if isinstance(loader, dict):
            _protect_workers(loader, runner)
    loader, loop = runner._train_dataloader, runner._train_loop
    if not isinstance(loader, dict):
        return
    default = dict(type=BatchSampler, drop_last=loader.pop('drop_last', False))
    loader['batch_sampler'] = dict(
        type=ResumableBatchSampler, batches=loader.get('batch_sampler') or default
    )
    if loop.get('by_epoch') or loop.get('type') in _LOOPS_BY_EPOCHS:
        loop.pop('by_epoch', None)
        loop['type'] = EpochBasedTrainLoop
    runner.register_hook(ExactResumeHook())


def _protect_workers(loader: dict, runner: Runner) -> None:
    if 'worker_init_fn' in loader:
        return
    loader['worker_init_fn'] = dict(
        type='mmcnv2.start_worker',
        num_workers=loader.get('num_workers', 0),
        rank=get_rank(),
        seed=runner.seed,
        disable_subprocess_warning=loader.pop('disable_subprocess_warning', False),
    )


def _has_gradients(runner: Runner) -> bool:
    # Those of other runners may be spread over processes.
    return isinstance(runner, Runner) and not is_between_steps(runner.optim_wrapper)


def _seed_iteration(runner: Runner) -> None:
    # In each process another, so that not all drop the same paths of their pictures.
    seed_draws(runner.seed + runner.rank, runner.iter)


def _place(runner: Runner) -> tuple[int, int]:
    return runner.seed, runner.rank


def _is_by_iterations(runner: Runner) -> bool:
    return isinstance(runner.train_loop, IterBasedTrainLoop)


def _start_loader(runner: Runner) -> None:
    loop, loader = runner.train_loop, runner.train_dataloader
    loader.batch_sampler.start(_place(runner), loop.iter, skip=loop.iter, endless=True)
    # The iterator that the loop was built with has nothing. It ends its workers first.
    loop.dataloader_iterator = None
    # The loop throws away what it takes for batches that have been trained on.
    loop.dataloader_iterator = itertools.chain(
        itertools.repeat(None, loop.iter), iter(loader)
    )


def _validation_is_due(runner: Runner) -> bool:
    """Whether a validation would have come right after the checkpoint was written."""
    loop, hub = runner.train_loop, runner.message_hub
    if runner.val_loop is None or hub.get_info(_VALIDATED) == loop.iter:
        return False
    by_iterations = _is_by_iterations(runner)
    now, last = loop.epoch, loop.max_epochs
    if by_iterations:
        now, last = loop.iter, loop.max_iters
    elif hub.get_info(_DONE, 0):
        return False
    loop._decide_current_val_interval()
    due = now % loop.val_interval == 0 or now == last
    return due and now >= max(loop.val_begin, 1)
