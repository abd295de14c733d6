"""Where the bytes of a guest range are.

A *shallow* mapping is what one layer knows; it may point at the layer below (`IndirectMapping`).
A mapping of the whole chain never does. Every mapping says how many bytes it holds for, counted
from the guest offset that was asked; that length is above zero except at the end of the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .access import FormatAccess
    from .format.base import FormatDriver
    from .storage.base import Storage

__all__ = [
    "EofMapping",
    "IndirectMapping",
    "Mapping",
    "RawMapping",
    "ShallowMapping",
    "SpecialMapping",
    "ZeroMapping",
    "merge_mappings",
]


@dataclass(frozen=True, slots=True)
class RawMapping:
    """The bytes lie as they are in `storage`.

    Attributes:
        length: Bytes that the mapping holds for.
        storage: Where they are.
        offset: The host offset of the first one in `storage`, in bytes.
        writable: Whether they may be changed in place.
    """

    length: int
    storage: Storage
    offset: int
    writable: bool = False


@dataclass(frozen=True, slots=True)
class ZeroMapping:
    """The bytes read as zero.

    Attributes:
        length: Bytes that the mapping holds for.
        explicit: The layer says zero itself (a zero cluster); False where nothing is allocated
            in any layer, or a layer below ended.
        allocated: The layer keeps host space for the range all the same.
    """

    length: int
    explicit: bool
    allocated: bool = False


@dataclass(frozen=True, slots=True)
class IndirectMapping:
    """The bytes are those of the layer below.

    Attributes:
        length: Bytes that the mapping holds for.
        layer: The image below.
        offset: The guest offset in `layer`, in bytes.
        writable: Always False in a chain of backing files.
    """

    length: int
    layer: FormatAccess
    offset: int
    writable: bool = False


@dataclass(frozen=True, slots=True)
class SpecialMapping:
    """The bytes must be asked of the driver (`FormatDriver.readv_special`), as if compressed.

    Attributes:
        length: Bytes that the mapping holds for.
        driver: The layer's driver.
        offset: The guest offset in that layer, in bytes.
    """

    length: int
    driver: FormatDriver
    offset: int


@dataclass(frozen=True, slots=True)
class EofMapping:
    """The guest offset is at or past the end of the image."""

    length: int = 0


Mapping = RawMapping | ZeroMapping | SpecialMapping | EofMapping
ShallowMapping = Mapping | IndirectMapping


def merge_mappings(held: Mapping | None, new: Mapping) -> Mapping | None:
    """One mapping for two neighbours, None if they are not alike."""
    match held, new:
        case RawMapping(), RawMapping() if (
            held.storage is new.storage
            and held.offset + held.length == new.offset
            and held.writable == new.writable
        ):
            return RawMapping(held.length + new.length, held.storage, held.offset, held.writable)
        case ZeroMapping(), ZeroMapping() if (
            held.explicit == new.explicit and held.allocated == new.allocated
        ):
            return ZeroMapping(held.length + new.length, held.explicit, held.allocated)
        case SpecialMapping(), SpecialMapping() if (
            held.driver is new.driver and held.offset + held.length == new.offset
        ):
            return SpecialMapping(held.length + new.length, held.driver, held.offset)
    return None
