"""Arguments from configs, compared with the types that a class says they have."""

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from functools import wraps
from numbers import Integral, Real
from typing import Any, TypeVar

Class = TypeVar('Class', bound=type)

_PLAIN: dict[Any, Any] = {
    float: Real,
    int: Integral,
    dict: Mapping,
    Mapping: Mapping,
    str: str,
}


def check_arguments(cls: Class) -> Class:
    """Let a class refuse arguments of other types than its annotations have.

    Where a config is wrong, the error then names the argument, and not a line somewhere
    within the class; and no text is taken for a list of letters. A decorator, which
    stands below that of the registry.

    Args:
        cls: The class.

    Returns:
        The same.
    """
    init = cls.__init__
    signature = inspect.signature(init)
    hints = typing.get_type_hints(init)

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            arguments = signature.bind(self, *args, **kwargs).arguments
        except TypeError as error:
            # What is unknown or missing.
            raise TypeError(f'{cls.__name__} {error}') from None
        for name, value in arguments.items():
            if name in hints and not _fits(value, hints[name]):
                expected = inspect.formatannotation(hints[name])
                raise TypeError(
                    f'{name} of {cls.__name__} is {value!r}, of type '
                    f'{type(value).__name__}, but expected was {expected}'
                )
        init(self, *args, **kwargs)

    cls.__init__ = checked
    return cls


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of a type, as far as configs may hold it."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is types.NoneType or value is None:
        return kind in (types.NoneType, Any) and value is None
    if kind is bool or isinstance(value, bool):
        return kind in (bool, Any) and isinstance(value, bool)
    # Those of configs hold one type throughout.
    if kind in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if kind is tuple and Ellipsis not in parts and len(parts) != len(value):
            return False
        return not parts or all(_fits(each, parts[0]) for each in value)
    return isinstance(value, _PLAIN.get(kind, object))
