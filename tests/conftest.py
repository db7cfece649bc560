"""What tests of several folders need, and what keeps them independent."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

needs_minkowski = pytest.mark.skipif(
    find_spec('MinkowskiEngine') is None,
    reason='MinkowskiEngine is not installed: bash tools/install_minkowski.sh',
)


def import_torchvision() -> None:
    """Make timm and mmpretrain, which import torchvision, importable.

    The build on PyPI is for CUDA. Beside a torch without, its compiled operators do not
    load, and it fails to import only because two are unknown. Nothing here uses them.
    """
    if find_spec('torchvision') is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ('nms', 'qnms'):
            schema = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
            torch.library.define(f'torchvision::{name}', schema)


import_torchvision()

# Tests run in several processes, and start more: each with a thread is the quickest.
torch.set_num_threads(1)
os.environ.setdefault('OMP_NUM_THREADS', '1')


@pytest.fixture(autouse=True)
def no_default_scope() -> Iterator[None]:
    """Forget the scope that a test's Runner has set: it changes how types are found."""
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture
def log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What MMEngine's current logger is told, whichever tests have run before."""
    logger = MMLogger.get_instance(str(tmp_path))
    logger.addHandler(caplog.handler)
    return caplog
