"""What keeps the tests independent of each other."""

from collections.abc import Iterator

import pytest
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def no_default_scope() -> Iterator[None]:
    """Forget the scope that a test's Runner has set: it changes how types are found."""
    yield
    DefaultScope._instance_dict.clear()
