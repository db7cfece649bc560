"""What hooks ask of a runner."""

from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.optim import BaseOptimWrapper, OptimWrapperDict
from torch import nn


def is_between_steps(wrapper: BaseOptimWrapper) -> bool:
    """Tell whether all gradients so far have led to a step of the optimizer.

    Args:
        wrapper: The optimizer, which may accumulate gradients.

    Returns:
        The answer.
    """
    parts = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    # DeepSpeed's accumulates out of sight.
    return all(part.should_update() for part in parts if hasattr(part, 'should_update'))


def unwrapped(model: Any) -> nn.Module:
    """Return a model itself, without what spreads it over processes.

    Args:
        model: A runner's.

    Returns:
        The model.
    """
    return model.module if is_model_wrapper(model) else model
