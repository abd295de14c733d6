"""imagofs: virtual-machine disk images as flat raw disks, in Python and through FUSE.

Names are imported on first use, so that the daemon starts without what it does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .access import FormatAccess as FormatAccess
    from .buffers import IoBuffer as IoBuffer
    from .creating import CreateOptions as CreateOptions
    from .creating import create_image as create_image
    from .errors import ChainError as ChainError
    from .errors import ClosedError as ClosedError
    from .errors import CorruptImageError as CorruptImageError
    from .errors import EncryptedImageError as EncryptedImageError
    from .errors import FormatError as FormatError
    from .errors import GateDeniedError as GateDeniedError
    from .errors import ImagofsError as ImagofsError
    from .errors import LockedError as LockedError
    from .errors import OutOfRangeError as OutOfRangeError
    from .errors import ReadOnlyError as ReadOnlyError
    from .errors import StorageError as StorageError
    from .errors import SyncLostError as SyncLostError
    from .errors import UnsupportedError as UnsupportedError
    from .errors import WrongTypeError as WrongTypeError
    from .format import FORMATS as FORMATS
    from .format import Format as Format
    from .format.base import DiscardTo as DiscardTo
    from .format.base import FormatDriver as FormatDriver
    from .format.qcow2.check import check_image as check_image
    from .format.qcow2.check_report import CheckResult as CheckResult
    from .format.qcow2.check_report import Finding as Finding
    from .format.qcow2.check_report import LostRange as LostRange
    from .format.qcow2.driver import Qcow2 as Qcow2
    from .format.raw import Raw as Raw
    from .format.vmdk import Vmdk as Vmdk
    from .gate import AllowDirectories as AllowDirectories
    from .gate import DenyImplicitOpenGate as DenyImplicitOpenGate
    from .gate import ImplicitOpenGate as ImplicitOpenGate
    from .gate import ImplicitOpenRequest as ImplicitOpenRequest
    from .gate import PermissiveImplicitOpenGate as PermissiveImplicitOpenGate
    from .gate import Role as Role
    from .mapping import EofMapping as EofMapping
    from .mapping import IndirectMapping as IndirectMapping
    from .mapping import Mapping as Mapping
    from .mapping import RawMapping as RawMapping
    from .mapping import ShallowMapping as ShallowMapping
    from .mapping import SpecialMapping as SpecialMapping
    from .mapping import ZeroMapping as ZeroMapping
    from .opening import FROM_HEADER as FROM_HEADER
    from .opening import FromHeader as FromHeader
    from .opening import open_image as open_image
    from .reading import Dependencies as Dependencies
    from .storage.annotated import AnnotatedStorage as AnnotatedStorage
    from .storage.base import PreallocateMode as PreallocateMode
    from .storage.base import Storage as Storage
    from .storage.base import StorageCreateOptions as StorageCreateOptions
    from .storage.base import StorageOpenOptions as StorageOpenOptions
    from .storage.file import FileStorage as FileStorage
    from .storage.memory import MemoryStorage as MemoryStorage
    from .storage.null import NullStorage as NullStorage
    from .sync import SyncFormatAccess as SyncFormatAccess
    from .vectors import IoVector as IoVector
    from .vectors import IoVectorMut as IoVectorMut

__version__ = "0.1.0"

_HOMES = {
    "access": ("FormatAccess",),
    "buffers": ("IoBuffer",),
    "creating": ("CreateOptions", "create_image"),
    "errors": (
        "ChainError",
        "ClosedError",
        "CorruptImageError",
        "EncryptedImageError",
        "FormatError",
        "GateDeniedError",
        "ImagofsError",
        "LockedError",
        "OutOfRangeError",
        "ReadOnlyError",
        "StorageError",
        "SyncLostError",
        "UnsupportedError",
        "WrongTypeError",
    ),
    "format": ("FORMATS", "Format"),
    "format.base": ("DiscardTo", "FormatDriver"),
    "format.qcow2.check": ("check_image",),
    "format.qcow2.check_report": ("CheckResult", "Finding", "LostRange"),
    "format.qcow2.driver": ("Qcow2",),
    "format.raw": ("Raw",),
    "format.vmdk": ("Vmdk",),
    "gate": (
        "AllowDirectories",
        "DenyImplicitOpenGate",
        "ImplicitOpenGate",
        "ImplicitOpenRequest",
        "PermissiveImplicitOpenGate",
        "Role",
    ),
    "mapping": (
        "EofMapping",
        "IndirectMapping",
        "Mapping",
        "RawMapping",
        "ShallowMapping",
        "SpecialMapping",
        "ZeroMapping",
    ),
    "opening": ("FROM_HEADER", "FromHeader", "open_image"),
    "reading": ("Dependencies",),
    "storage.annotated": ("AnnotatedStorage",),
    "storage.base": ("PreallocateMode", "Storage", "StorageCreateOptions", "StorageOpenOptions"),
    "storage.file": ("FileStorage",),
    "storage.memory": ("MemoryStorage",),
    "storage.null": ("NullStorage",),
    "sync": ("SyncFormatAccess",),
    "vectors": ("IoVector", "IoVectorMut"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
