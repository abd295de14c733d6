"""Storages: where the bytes of an image's files are.

Names are imported on first use, so that a mount starts without the drivers that it does not use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .annotated import AnnotatedStorage
    from .base import PreallocateMode, Storage, StorageCreateOptions, StorageOpenOptions
    from .blockers import RangeLocks, WriteBlockers
    from .file import FileStorage
    from .memory import MemoryStorage
    from .null import NullStorage

__all__ = [
    "AnnotatedStorage",
    "FileStorage",
    "MemoryStorage",
    "NullStorage",
    "PreallocateMode",
    "RangeLocks",
    "Storage",
    "StorageCreateOptions",
    "StorageOpenOptions",
    "WriteBlockers",
]

_HOMES = {
    "AnnotatedStorage": "annotated",
    "FileStorage": "file",
    "MemoryStorage": "memory",
    "NullStorage": "null",
    "PreallocateMode": "base",
    "RangeLocks": "blockers",
    "Storage": "base",
    "StorageCreateOptions": "base",
    "StorageOpenOptions": "base",
    "WriteBlockers": "blockers",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
