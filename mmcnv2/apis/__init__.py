"""Ready-made ways to use a model from Python."""

from .fcmae_inferencer import FCMAEInferencer

__all__ = ['FCMAEInferencer']
