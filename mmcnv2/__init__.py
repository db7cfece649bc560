"""ConvNeXt V2 for OpenMMLab: FCMAE pre-training and dense prediction.

Importing this package, as ``custom_imports=dict(imports=['mmcnv2'])`` does, registers
everything in it and makes loading checkpoints safe.
"""

from .environment import check_environment

# First of all, since importing MMEngine may fail for the reason that this explains.
check_environment()

from mmengine.config.utils import MODULE2PACKAGE  # noqa: E402

from . import engine, registry  # noqa: E402
from .version import __version__  # noqa: E402

# So that 'mmcnv2::...' works as a base config. MMEngine looks for the folder .mim where
# the named distribution is installed, which for an in-place install is not where the
# package is, or else beside the named module. mmseg goes by its module too, because the
# onedl fork distributes it under another name.
MODULE2PACKAGE.update(mmcnv2='mmcnv2.registry', mmseg='mmseg')

__all__ = ['__version__', 'engine', 'registry']
