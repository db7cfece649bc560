"""Whether features collapse, as training goes on."""

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..arguments import check_arguments
from ..evaluation.diversity import BLOCKS, NAMES, DiversityRecorder
from ..registry import HOOKS
from .runner_state import unwrapped


@HOOKS.register_module()
@check_arguments
class FeatureDiversityHook(Hook):
    """Log how much the channels of each layer differ, in training.

    It measures what the layers put out for the training pictures of an iteration:
    pre-training shows it the visible patches. Nothing runs a second time, no random
    number is drawn, and the weights become what they would without it.

    MMEngine's visualizer, and so each of its backends, gets ``feature_distance/``,
    ``dead_channels/`` and ``saturated_channels/`` with the name of the layer behind;
    see :func:`~mmcnv2.evaluation.feature_diversity` for what they are. Each is the mean
    over the pictures of all processes.

    Args:
        interval: Measure in each iteration whose number is a multiple of this.
        layers: What to measure, by names below the backbone, with ``*`` for any part
            between two dots; see :func:`~mmcnv2.evaluation.find_layers`. The output of
            each block by default. What is within a block is computed layer by layer
            while it is measured, and rounded differently.

    Raises:
        ValueError: If ``interval`` is not positive.
    """

    def __init__(self, interval: int = 100, layers: Sequence[str] = BLOCKS) -> None:
        if interval < 1:
            raise ValueError(
                f'interval is {interval}; give a positive number of iterations'
            )
        self.interval = interval
        self.layers = layers

    def before_train(self, runner: Runner) -> None:
        """Find the layers.

        Raises:
            ValueError: If the model has no backbone of ours, or no such layer.
        """
        model = unwrapped(runner.model)
        if not hasattr(model, 'backbone'):
            raise ValueError(
                f'FeatureDiversityHook measures the backbone of a model, but '
                f'{type(model).__name__} has none; remove the hook from the config'
            )
        self._recorder = DiversityRecorder(model.get_submodule('backbone'), self.layers)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Start measuring if this iteration's turn has come."""
        if self.every_n_train_iters(runner, self.interval):
            self._recorder.start()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Log what was measured."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        self._recorder.stop()
        tags = ('feature_distance', 'dead_channels', 'saturated_channels')
        scalars = {
            f'{tag}/{layer}': values[name]
            for layer, values in self._recorder.result().items()
            for tag, name in zip(tags, NAMES, strict=True)
        }
        # Counted as the loss is.
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
