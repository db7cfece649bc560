"""Training by ``torch.compile``."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..arguments import check_arguments
from ..registry import HOOKS
from .feature_diversity import FeatureDiversityHook
from .runner_state import is_between_steps, unwrapped


@HOOKS.register_module()
@check_arguments
class CompileHook(Hook):
    """Compile a part of the model, which then trains quicker on GPUs.

    What is called all at once, from a CUDA graph, does not wait for a CPU that calls
    one kernel after the other. It takes minutes at the start, and again whenever
    pictures of another size come, or fewer of them: it is for batches of one shape, as
    pre-training has them. Validation and tests are not compiled. (MMEngine's own
    ``compile`` takes in the optimizer's step.)

    Args:
        module: The part, by its name in the model. Defaults to 'backbone'.
        **options: Of ``torch.compile``, besides ``mode='reduce-overhead'`` and
            ``dynamic=False``, or in their place.
    """

    def __init__(self, module: str = 'backbone', **options: Any) -> None:
        self.module = module
        self.options = dict(mode='reduce-overhead', dynamic=False) | options

    def before_train(self, runner: Runner) -> None:
        """Compile it, which takes place when it first runs.

        Raises:
            ValueError: If the model has no such part, or features are measured, which
                nobody can see in what is compiled.
        """
        if any(isinstance(hook, FeatureDiversityHook) for hook in runner.hooks):
            raise ValueError(
                'CompileHook and FeatureDiversityHook do not go together: no layer can '
                'be looked at in what is compiled; remove one of them from the config'
            )
        model = unwrapped(runner.model)
        try:
            part = model.get_submodule(self.module)
        except AttributeError:
            names = ', '.join(name for name, _ in model.named_children())
            raise ValueError(
                f"module of CompileHook is '{self.module}', but {type(model).__name__} "
                f'has no such part; it has {names}'
            ) from None
        part.compile(**self.options)
        self._parameters = list(part.parameters())
        self._accumulates = False

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Keep gradients that accumulate where no graph writes over them."""
        accumulated = self._accumulates
        self._accumulates = not is_between_steps(runner.optim_wrapper)
        if accumulated or not self._accumulates:
            return
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        # Validation and tests may have pictures of many sizes.
        torch.compiler.set_stance('default' if mode == 'train' else 'force_eager')

    def _after_epoch(self, runner: Runner, mode: str = 'train') -> None:
        torch.compiler.set_stance('default')
