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
WEIGHT_INITIALIZERS = _child(
    roots.WEIGHT_INITIALIZERS, 'mmcnv2.engine', 'mmcnv2.models'
)
LOOPS = _child(roots.LOOPS, 'mmcnv2.engine')
FUNCTIONS = _child(roots.FUNCTIONS, 'mmcnv2.engine')
STRATEGIES = _child(roots.STRATEGIES, 'mmcnv2.engine')

# Nothing of ours stands in these, but where ``default_scope`` is ``mmcnv2`` MMEngine
# looks here first and would warn of each that it does not find.
DATA_SAMPLERS = _child(roots.DATA_SAMPLERS, 'mmcnv2.datasets')
EVALUATOR = _child(roots.EVALUATOR, 'mmcnv2.evaluation')
LOG_PROCESSORS = _child(roots.LOG_PROCESSORS, 'mmcnv2.engine')
MODEL_WRAPPERS = _child(roots.MODEL_WRAPPERS, 'mmcnv2.models')
OPTIMIZERS = _child(roots.OPTIMIZERS, 'mmcnv2.engine')
OPTIM_WRAPPERS = _child(roots.OPTIM_WRAPPERS, 'mmcnv2.engine')
PARAM_SCHEDULERS = _child(roots.PARAM_SCHEDULERS, 'mmcnv2.engine')
RUNNERS = _child(roots.RUNNERS, 'mmcnv2.engine')
VISBACKENDS = _child(roots.VISBACKENDS, 'mmcnv2.visualization')
VISUALIZERS = _child(roots.VISUALIZERS, 'mmcnv2.visualization')
