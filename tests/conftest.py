"""What tests of several folders need, and what keeps them independent."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from mmengine.registry import DefaultScope

needs_minkowski = pytest.mark.skipif(
    find_spec('MinkowskiEngine') is None,
    reason='MinkowskiEngine is not installed: bash tools/install_minkowski.sh',
)


@pytest.fixture(autouse=True)
def no_default_scope() -> Iterator[None]:
    """Forget the scope that a test's Runner has set: it changes how types are found."""
    yield
    DefaultScope._instance_dict.clear()
