"""Checks of arguments where callers come in: a type that cannot be meant is `WrongTypeError`."""

from __future__ import annotations

import errno
import os

from .errors import OutOfRangeError, StorageError, WrongTypeError

__all__ = ["check_size", "check_type", "path_of"]


def check_type(what: str, value: object, *kinds: type) -> None:
    """See that `value` is of one of `kinds`.

    Args:
        what: What the value is for, for the message: "the gate".
        value: The argument.
        kinds: Types that it may have.

    Raises:
        WrongTypeError: It has none of them.
    """
    if not isinstance(value, kinds):
        names = " or ".join(kind.__name__ for kind in kinds).replace("NoneType", "None")
        raise WrongTypeError(f"{what} is {value!r}, which is no {names}")


def check_size(what: str, value: object) -> None:
    """See that `value` is an int, and not negative.

    Raises:
        WrongTypeError: It is no int.
        OutOfRangeError: It is negative.
    """
    check_type(what, value, int)
    assert isinstance(value, int)
    if value < 0:
        raise OutOfRangeError(f"{what} is negative: {value}")


def path_of(path: str | os.PathLike[str]) -> str:
    """The path as a string.

    Raises:
        StorageError: It is empty: what is made of it would name the current directory.
        WrongTypeError: It is no path of characters.
    """
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(name, str):
        raise WrongTypeError(f"{path!r} is no path of type str or PathLike[str]")
    if not name:
        raise StorageError("a path is empty", error=errno.ENOENT)
    return name
