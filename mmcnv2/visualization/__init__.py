"""Pictures of what a pre-trained model does."""

from .diversity import channel_grid, diversity_plot, unpack_tokens
from .reconstruction import ReconstructionVisualizationHook, reconstruction_grid

__all__ = [
    'ReconstructionVisualizationHook',
    'channel_grid',
    'diversity_plot',
    'reconstruction_grid',
    'unpack_tokens',
]
