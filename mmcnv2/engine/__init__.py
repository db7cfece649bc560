"""What happens around a training step. Importing it makes loading checkpoints safe."""

from . import checkpoint
from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['LayerDecayOptimWrapperConstructor', 'checkpoint']
