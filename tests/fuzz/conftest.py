"""How many cases there are, and what a clear error is."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

# MMCNV2_FUZZ=20 pytest tests/fuzz tries twenty times as many cases, and other ones.
FACTOR = int(os.environ.get('MMCNV2_FUZZ', '1'))

# An error that Python or a library meant to raise, and no accident.
CLEAR = (FileNotFoundError, ImportError, RuntimeError, SystemExit, ValueError)

Try = Callable[..., object]


@pytest.fixture
def generator() -> np.random.Generator:
    """What all cases are drawn from; the code under test has NumPy's global one."""
    np.random.seed(FACTOR)
    return np.random.default_rng(FACTOR)


@contextmanager
def clear_error(*named: object) -> Iterator[list[Exception]]:
    """Accept an error of a known kind that names a file or a key, and nothing else.

    Its message goes into the list that ``with`` gives, which stays empty without one.
    """
    raised: list[Exception] = []
    try:
        yield raised
    except CLEAR as error:
        raised.append(error)
    for error in raised:
        assert any(str(name) in str(error) for name in named), repr(error)


def damaged(data: bytes, generator: np.random.Generator) -> bytes:
    """Cut data short, or flip up to four bits, half of the times near the start."""
    if generator.random() < 0.3:
        return data[: generator.integers(len(data))]
    flipped = bytearray(data)
    end = len(data) if generator.random() < 0.5 else min(len(data), 256)
    for place in generator.integers(0, end, generator.integers(1, 5)):
        flipped[place] ^= 1 << generator.integers(8)
    return bytes(flipped)
