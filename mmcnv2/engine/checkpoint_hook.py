"""Writing checkpoints so that there always is one to resume from."""

import logging
import signal
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, is_main_process
from mmengine.hooks import CheckpointHook as _CheckpointHook
from mmengine.hooks import EMAHook
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..arguments import check_arguments
from ..registry import HOOKS
from .checkpoint import PARTIAL, write_whole
from .exact_resume import share_gradients
from .runner_state import is_between_steps

INTERRUPTED = 'interrupted.pth'

# What a shell reports of a process that SIGTERM has ended.
_EXIT_CODE = 128 + signal.SIGTERM


@HOOKS.register_module()
@check_arguments
class CheckpointHook(_CheckpointHook):
    """MMEngine's, which removes a checkpoint only when there is a newer one.

    A write that fails, for a full disk say, is logged, and the checkpoints that there
    are stay. ``last_checkpoint`` never names one that was not written to its end.

    SIGTERM, in whichever of the processes, makes all of them stop after the next step
    of the optimizer, or in validation at once, with ``interrupted.pth`` written to
    resume from. The exit code is 143.

    Args:
        interval (int): Epochs or iterations from one checkpoint to the next; -1 for
            none. Defaults to -1.
        stop_if_not_saved (bool): Whether to stop training when a checkpoint cannot be
            written. Defaults to False.
        **kwargs: MMEngine's.

    Raises:
        TypeError: If there is an argument that MMEngine's has not.
    """

    def __init__(
        self,
        interval: int = -1,
        *args: Any,
        stop_if_not_saved: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(interval, *args, **kwargs)
        # MMEngine keeps them for the first checkpoint, whose writing then fails.
        if self.args:
            raise TypeError(
                f'CheckpointHook has no argument {", ".join(map(repr, self.args))}; '
                "it has MMEngine's and stop_if_not_saved"
            )
        self.stop_if_not_saved = stop_if_not_saved
        self._told_to_stop = False
        self._handler: Any = signal.SIG_DFL  # of before

    def before_train(self, runner: Runner) -> None:
        """Look at what there is, and listen to SIGTERM."""
        super().before_train(runner)
        if is_main_process():
            # Left behind by a process that was killed while it wrote.
            for path in Path(self.out_dir).glob(f'*.pth{PARTIAL}'):
                with suppress(OSError):
                    path.unlink()
        self._handler = _listen(self._note_signal)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save if it is time to; stop if a signal has asked for it.

        Raises:
            SystemExit: If one has.
        """
        super().after_train_iter(runner, *args, **kwargs)
        if is_between_steps(runner.optim_wrapper) and self._shall_stop():
            self._stop(runner, dict(epoch=runner.epoch, iter=runner.iter + 1))

    def before_val(self, runner: Runner) -> None:
        """Find out how long all processes validate."""
        batches = torch.tensor(len(runner.val_dataloader))
        all_reduce(batches, 'min')
        self._common_batches = batches.item()

    def after_val_iter(
        self, runner: Runner, batch_idx: int, *args: Any, **kwargs: Any
    ) -> None:
        """Stop if a signal has asked for it.

        Raises:
            SystemExit: If one has.
        """
        # Other runners number the iterations of a checkpoint themselves.
        if not isinstance(runner, Runner) or batch_idx >= self._common_batches:
            return
        if not self._shall_stop():
            return
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                # As after validation.
                hook._swap_ema_parameters()
        self._stop(runner, dict(epoch=runner.epoch, iter=runner.iter))

    def after_train(self, runner: Runner) -> None:
        """Publish, as MMEngine does, and leave SIGTERM to who had it before."""
        super().after_train(runner)
        _listen(self._handler)

    def _note_signal(self, *_: Any) -> None:
        self._told_to_stop = True

    def _shall_stop(self) -> bool:
        """Whether any of the processes was told to."""
        told = torch.tensor(int(self._told_to_stop))
        all_reduce(told, 'max')
        return bool(told)

    def _stop(self, runner: Runner, meta: dict[str, int]) -> None:
        share_gradients(runner)
        saved = self._save(runner, INTERRUPTED, meta, by_epoch=False)
        barrier()
        # What TensorBoard has not written yet.
        runner.visualizer.close()
        runner.logger.warning(
            f'Stopped by SIGTERM after iteration {meta["iter"]}. '
            + (f'--resume goes on from {self.last_ckpt}.' if saved else 'Not saved.')
        )
        raise SystemExit(_EXIT_CODE)

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict[str, int]
    ) -> None:
        share_gradients(runner)
        steps = [*getattr(self, 'keep_ckpt_ids', ()), step]
        steps = [*dict.fromkeys(steps)]
        if self.max_keep_ckpts > 0:
            runner.message_hub.update_info('keep_ckpt_ids', steps)
        name = self.filename_tmpl.format
        saved = self._save(runner, name(step), meta, self.by_epoch)
        if saved and self.max_keep_ckpts > 0:
            outdated = steps[: -self.max_keep_ckpts]
            self._remove([self._path(name(old)) for old in outdated])
            self.keep_ckpt_ids = deque(steps[-self.max_keep_ckpts :])

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Remove the best checkpoint so far when there is a better one, not before."""
        if not self.save_best:
            return
        self.file_backend = later = _RemovesLater(self.file_backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        except OSError as error:
            self._report(error)
            later.paths.clear()
        finally:
            self.file_backend = later.backend
        infos = runner.message_hub.runtime_info.items()
        best = [info for key, info in infos if key.startswith('best_ckpt')]
        # What was resumed from in another folder is that run's.
        own = [path for path in later.paths if path == self._path(Path(path).name)]
        self._remove([path for path in own if path not in best])

    def _save(
        self, runner: Runner, name: str, meta: dict[str, int], by_epoch: bool
    ) -> bool:
        """Write a checkpoint, and then that it is the last one."""
        path = self._path(name)
        runner.message_hub.update_info('last_ckpt', path)
        try:
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=by_epoch,
                backend_args=self.backend_args,
            )
            if is_main_process():
                write_whole(Path(runner.work_dir, 'last_checkpoint'), path.encode())
        except OSError as error:
            self._report(error)
            return False
        self.last_ckpt = path
        return True

    def _report(self, error: OSError) -> None:
        message = f'A checkpoint could not be written ({error}); those before it stay.'
        if self.stop_if_not_saved:
            raise RuntimeError(f'{message} Training stops for it.') from error
        print_log(f'{message} Training goes on.', 'current', logging.ERROR)

    def _path(self, name: str) -> str:
        return self.file_backend.join_path(self.out_dir, name)

    def _remove(self, paths: Sequence[str]) -> None:
        if not is_main_process():
            return
        for path in paths:
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):
                # DeepSpeed's.
                self.file_backend.rmtree(path)


def _listen(handler: Any) -> Any:
    """Set who handles SIGTERM, and return who has until now."""
    # Python lets no other thread do so.
    if threading.current_thread() is not threading.main_thread():
        return handler
    before = signal.signal(signal.SIGTERM, handler)
    # One that was left behind by a training that failed has nothing to stop.
    owner = getattr(before, '__self__', None)
    before = owner._handler if isinstance(owner, CheckpointHook) else before
    # Python knows nothing of one that was set from C.
    return before or signal.SIG_DFL


class _RemovesLater:
    """A file backend that takes note of what is to be removed."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.paths: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.paths.append(path)

    rmtree = remove
