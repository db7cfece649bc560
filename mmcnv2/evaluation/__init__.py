"""What to measure of a pre-trained model."""

from .diversity import DiversityRecorder, feature_diversity, find_layers
from .reconstruction import ReconstructionMetric, hidden_psnr

__all__ = [
    'DiversityRecorder',
    'ReconstructionMetric',
    'feature_diversity',
    'find_layers',
    'hidden_psnr',
]
