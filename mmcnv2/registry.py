"""Registries of mmcnv2, children of MMEngine's roots under the scope ``mmcnv2``.

Each one names the modules that fill it. MMEngine imports them when the first
of its types is asked for, so a registry costs nothing until it is used, and
``mmcnv2.models`` needs torch and MMEngine alone.
"""

from mmengine import registry as roots
from mmengine.registry import Registry


def _child(root: Registry, *locations: str) -> Registry:
    return Registry(root.name, parent=root, scope='mmcnv2', locations=[*locations])


MODELS = _child(roots.MODELS, 'mmcnv2.models')
DATASETS = _child(roots.DATASETS, 'mmcnv2.datasets')
TRANSFORMS = _child(roots.TRANSFORMS, 'mmcnv2.datasets')
HOOKS = _child(roots.HOOKS, 'mmcnv2.engine', 'mmcnv2.visualization')
METRICS = _child(roots.METRICS, 'mmcnv2.evaluation')
INFERENCERS = _child(roots.INFERENCERS, 'mmcnv2.apis')
OPTIM_WRAPPER_CONSTRUCTORS = _child(roots.OPTIM_WRAPPER_CONSTRUCTORS, 'mmcnv2.engine')
