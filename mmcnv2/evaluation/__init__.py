"""What to measure of a pre-trained model."""

from .reconstruction import ReconstructionMetric, hidden_psnr

__all__ = ['ReconstructionMetric', 'hidden_psnr']
