"""What tests of several folders need, and what keeps them independent."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

from mmcnv2.benchmarks.networks import import_torchvision

needs_minkowski = pytest.mark.skipif(
    find_spec('MinkowskiEngine') is None,
    reason='MinkowskiEngine is not installed: bash tools/install_minkowski.sh',
)

# Some tests are of timm and mmpretrain.
import_torchvision()

# Tests run in several processes, and start more: each with a thread is the quickest.
torch.set_num_threads(1)
os.environ.setdefault('OMP_NUM_THREADS', '1')

# Where a shell runs them in the background, what they start would ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='module', autouse=True)
def spared_modules() -> None:
    """Spare the garbage collector what is imported: each data set makes it look."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_default_scope() -> Iterator[None]:
    """Forget the scope that a test's Runner has set: it changes how types are found."""
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Let ``torch.compile`` forget what it has compiled: it counts, and stops."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def to_one_graph(fresh_compiler: None) -> Callable:
    """``torch.compile``, to a single graph."""
    return partial(torch.compile, fullgraph=True)


@pytest.fixture
def log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What MMEngine's current logger is told, whichever tests have run before."""
    logger = MMLogger.get_instance(str(tmp_path))
    logger.addHandler(caplog.handler)
    return caplog
