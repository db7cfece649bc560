"""What tests of several folders need, and what keeps them independent."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
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


@pytest.fixture(autouse=True)
def no_default_scope() -> Iterator[None]:
    """Forget the scope that a test's Runner has set: it changes how types are found."""
    yield
    DefaultScope._instance_dict.clear()
