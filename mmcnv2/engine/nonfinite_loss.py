"""A stop at losses that are no numbers, and where they come from."""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from ..arguments import check_arguments
from ..registry import HOOKS

_ADVICE = (
    'Look at the pictures named and their annotations. Resume from the last checkpoint '
    'with a lower learning rate or clipped gradients (optim_wrapper.clip_grad). In '
    "float16, which ends at 65504, take optim_wrapper.dtype='bfloat16' instead."
)

# A loss scaler skips such steps, and float16 may need it to, now and then.
_WITH_LOSS_SCALER = 10


@HOOKS.register_module()
@check_arguments
class NonFiniteLossHook(Hook):
    """Stop training when the loss is infinite or not a number, and say why.

    The losses of every forward pass are looked at before the step that they lead to.
    At the first one of a row that is not finite the batch runs once more, with the
    random numbers, autocast and weights it had, to find the first layer that puts out
    such values; the iteration, that layer and the paths of the pictures are logged.
    Random numbers and running statistics then are what they would be without it. At the
    last one of the row training stops with the same message, in all processes at once:
    one number goes around between them in each iteration.

    ``tools/train.py`` has this hook for every config that has none itself.

    Args:
        max_in_a_row: The iterations in a row with such a loss at which training stops.
            Defaults to 10 under a loss scaler (``AmpOptimWrapper``), which skips the
            steps of such losses, and to 1 otherwise, for one such step ruins all
            weights.

    Raises:
        ValueError: If ``max_in_a_row`` is not positive.
    """

    def __init__(self, max_in_a_row: int | None = None) -> None:
        if max_in_a_row is not None and max_in_a_row < 1:
            raise ValueError(
                f'max_in_a_row is {max_in_a_row}; give a positive number of iterations'
            )
        self.max_in_a_row = max_in_a_row

    def before_train(self, runner: Runner) -> None:
        """Look at each forward pass from here on."""
        scaled = hasattr(runner.optim_wrapper, 'loss_scaler')
        self._limit = self.max_in_a_row or (_WITH_LOSS_SCALER if scaled else 1)
        self._runner = runner
        self._in_a_row = 0
        self._handles = [
            runner.model.register_forward_pre_hook(self._before_forward),
            runner.model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def after_train(self, runner: Runner) -> None:
        """Look no longer."""
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, model: nn.Module, args: tuple) -> None:
        self._random_states = _random_states()

    def _after_forward(
        self, model: nn.Module, args: tuple, kwargs: dict, losses: Any
    ) -> None:
        # Without gradients it is validation, or the second run below.
        if kwargs.get('mode') != 'loss' or not torch.is_grad_enabled():
            return
        losses = {name: value for name, value in losses.items() if 'loss' in name}
        if _are_finite_everywhere(losses):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._in_a_row == 1:
            self._report = self._examine(model, args, kwargs, losses)
            print_log(self._report, logger='current', level=logging.WARNING)
        if self._in_a_row >= self._limit:
            raise FloatingPointError(
                f'{self._report}\nTraining stops, for losses of {self._in_a_row} '
                f'iterations in a row were not finite. {_ADVICE}'
            )

    def _examine(
        self, model: nn.Module, args: tuple, kwargs: dict, losses: dict[str, Any]
    ) -> str:
        broken = [name for name, value in losses.items() if not _is_finite(value)]
        # In all processes, for layers may communicate.
        layer = _first_layer(model, args, kwargs, self._random_states)
        pictures = ', '.join(_paths([args, kwargs])) or 'not known'
        found = f'Process {get_rank()}: {", ".join(broken)}. {layer} {pictures}'
        return '\n'.join(
            [
                f'The loss of iteration {self._runner.iter + 1} is not finite.',
                *filter(None, all_gather_object(found if broken else '')),
            ]
        )


def _are_finite_everywhere(losses: dict[str, Tensor | list[Tensor]]) -> bool:
    """Look into all processes, and wait for the device just once."""
    values = [v for value in losses.values() for v in _flat(value)]
    total = sum(value.detach().float().sum() for value in values)
    broken = torch.as_tensor(total).isfinite().logical_not().float()
    all_reduce(broken, 'max')
    return not broken


def _is_finite(value: Any) -> bool:
    tensors = (each for each in _flat(value) if isinstance(each, Tensor))
    return all(bool(each.isfinite().all()) for each in tensors)


def _paths(value: Any) -> list[str]:
    """Find the paths of pictures among what a model gets."""
    samples = (each for each in _flat(value) if isinstance(each, BaseDataElement))
    return [str(each.img_path) for each in samples if 'img_path' in each]


def _flat(value: Any) -> Iterator[Any]:
    """List what is in nested dicts, lists and tuples."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        yield value
        return
    for each in value:
        yield from _flat(each)


def _random_states() -> list[Tensor]:
    """Take the state of the CPU's generator, and of the accelerator's in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def _run_again(
    model: nn.Module, args: tuple, kwargs: dict, random_states: list[Tensor]
) -> None:
    """Repeat a forward pass, and leave no trace of it."""
    # Others, since the backward pass of the first run needs its own as they are.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    now = _random_states()
    _set_random_states(random_states)
    try:
        # Layers that are compiled would not be seen.
        with torch.no_grad(), torch.compiler.set_stance('force_eager'):
            functional_call(model, buffers, args, kwargs)
    finally:
        _set_random_states(now)


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def _first_layer(
    model: nn.Module, args: tuple, kwargs: dict, random_states: list[Tensor]
) -> str:
    """Run a batch, and tell which layer first put out what is not finite."""
    found: list[str] = []

    def look(name: str, layer: nn.Module, given: tuple, output: Any) -> None:
        if found or _is_finite(output):
            return
        kind = f'{name} ({type(layer).__name__})'
        if not _is_finite(list(layer.parameters())):
            found.append(f'{kind}, whose weights are not finite')
        elif not _is_finite(given):
            found.append(f'{kind}, for what it was given was not finite')
        else:
            found.append(f'{kind}, from finite weights and features')

    # Sharded models are whole only within their wrapper.
    model = model.module if isinstance(model, DistributedDataParallel) else model
    handles = [
        layer.register_forward_hook(partial(look, name))
        for name, layer in model.named_modules()
        if name
    ]
    try:
        _run_again(model, args, kwargs, random_states)
    except torch.OutOfMemoryError:
        return 'There was no memory to find the layer. Pictures:'
    finally:
        for handle in handles:
            handle.remove()
    if not _is_finite([args, kwargs]):
        return 'Pixels of the pictures are not finite already:'
    if not found:
        return 'All layers put out finite values, so it is the loss itself. Pictures:'
    return f'The first layer to put out such values: {found[0]}. Pictures:'
