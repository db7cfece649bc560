"""What happens around a training step. Importing it makes loading checkpoints safe."""

from . import checkpoint
from .broken_images import BrokenImagesHook
from .checkpoint_hook import CheckpointHook
from .compile_hook import CompileHook
from .exact_resume import EpochBasedTrainLoop, ExactResumeHook
from .feature_diversity import FeatureDiversityHook
from .fsdp import FSDPStrategy, wrap_blocks
from .layer_decay import LayerDecayOptimWrapperConstructor
from .nonfinite_loss import NonFiniteLossHook
from .pretrained import PretrainedBackbone

__all__ = [
    'BrokenImagesHook',
    'CheckpointHook',
    'CompileHook',
    'EpochBasedTrainLoop',
    'ExactResumeHook',
    'FSDPStrategy',
    'FeatureDiversityHook',
    'LayerDecayOptimWrapperConstructor',
    'NonFiniteLossHook',
    'PretrainedBackbone',
    'checkpoint',
    'wrap_blocks',
]
