"""Pictures of what a pre-trained model does."""

from .diversity import channel_grid, diversity_plot, unpack_tokens
from .reconstruction import (
    ReconstructionVisualizationHook,
    displayable,
    paint_mask,
    reconstruction_grid,
)

__all__ = [
    'ReconstructionVisualizationHook',
    'channel_grid',
    'displayable',
    'diversity_plot',
    'paint_mask',
    'reconstruction_grid',
    'unpack_tokens',
]
