"""What happens around a training step. Importing it makes loading checkpoints safe."""

from . import checkpoint
from .broken_images import BrokenImagesHook
from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['BrokenImagesHook', 'LayerDecayOptimWrapperConstructor', 'checkpoint']
