"""Pictures of what a pre-trained model does."""

from .reconstruction import ReconstructionVisualizationHook, reconstruction_grid

__all__ = ['ReconstructionVisualizationHook', 'reconstruction_grid']
