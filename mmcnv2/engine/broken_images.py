"""How many of the pictures are broken, and a stop when these are too many."""

import logging
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object, master_only
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..arguments import check_arguments
from ..registry import HOOKS

_FILE = 'broken_images.txt'
_KEY = 'broken_images'
_NAMED = 5


@HOOKS.register_module()
@check_arguments
class BrokenImagesHook(Hook):
    """Report the files that the data set could not read; stop if they are too many.

    :class:`~mmcnv2.datasets.UnlabelledImages` puts another picture in the place of one
    that it cannot read, in a loader worker, and the paths arrive here with that
    picture, as ``broken_paths`` of its data sample. Each file counts once, also in a
    run that is resumed. At the end of each epoch, and of training by iterations, the
    number is logged and all paths are written to ``broken_images.txt`` in the log
    folder of the run.

    Of several processes each checks what it met itself after every iteration, which
    needs no communication, and at the end of an epoch all check what all of them met.

    Args:
        max_share: Share of the data set, from 0 to 1, above which training stops.

    Raises:
        ValueError: If ``max_share`` is not a share.
    """

    def __init__(self, max_share: float = 0.01) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f'max_share is {max_share}, but a share is from 0 to 1.')
        self.max_share = max_share
        self._broken: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        """Go on from what a resumed run had met."""
        self._broken = set(runner.message_hub.get_info(_KEY, []))

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict[str, Any] | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Take note of what the data set replaced in this batch.

        Raises:
            RuntimeError: If too many files are broken.
        """
        samples = (data_batch or {}).get('data_samples') or []
        new = {path for sample in samples for path in sample.get('broken_paths', ())}
        if not new <= self._broken:
            self._note(runner, new)
            self._check(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Put together what all processes met, and report it.

        For a loop by iterations this is the end of training.

        Raises:
            RuntimeError: If too many files are broken, in all processes alike.
        """
        self._note(runner, set().union(*all_gather_object(self._broken)))
        if self._broken:
            self._report(runner)
            self._check(runner)

    def _note(self, runner: Runner, paths: set[str]) -> None:
        self._broken |= paths
        # What the message hub holds goes into checkpoints.
        runner.message_hub.update_info(_KEY, sorted(self._broken))

    @master_only
    def _report(self, runner: Runner) -> None:
        file = Path(runner.log_dir, _FILE)
        file.write_text(''.join(f'{path}\n' for path in sorted(self._broken)))
        # MMEngine would not log the same words again in the next epoch.
        print_log(
            f'By iteration {runner.iter} {self._count(runner)} could not be read and '
            f'were replaced by others. All paths are in {file}; the first: '
            f'{self._first()}',
            logger='current',
            level=logging.WARNING,
        )

    def _check(self, runner: Runner) -> None:
        if len(self._broken) / _number_of_pictures(runner) <= self.max_share:
            return
        raise RuntimeError(
            f'{self._count(runner)} could not be read, more than max_share='
            f'{self.max_share:g} allows. The first: {self._first()}. Mend or remove '
            'these files, or, if training without them is fine, raise '
            'default_hooks.broken_images.max_share in the config.'
        )

    def _count(self, runner: Runner) -> str:
        return f'{len(self._broken)} of {_number_of_pictures(runner)} pictures'

    def _first(self) -> str:
        return ', '.join(sorted(self._broken)[:_NAMED])


def _number_of_pictures(runner: Runner) -> int:
    return _count_files(runner.train_dataloader.dataset)


def _count_files(dataset: Any) -> int:
    """Look into MMEngine's wrappers, of which some repeat pictures."""
    if hasattr(dataset, 'datasets'):
        return sum(map(_count_files, dataset.datasets))
    if hasattr(dataset, 'dataset'):
        return _count_files(dataset.dataset)
    return len(dataset)
