from .convnextv2 import ARCHITECTURES, ConvNeXtV2
from .data_preprocessor import FCMAEDataPreprocessor
from .fcmae import FCMAE, FCMAEDecoder, FCMAEHead, FCMAEInit

__all__ = [
    'ARCHITECTURES',
    'FCMAE',
    'ConvNeXtV2',
    'FCMAEDataPreprocessor',
    'FCMAEDecoder',
    'FCMAEHead',
    'FCMAEInit',
]
