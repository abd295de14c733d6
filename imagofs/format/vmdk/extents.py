"""The extents of an open VMDK: which part of the disk each is, and where its bytes are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from ...errors import FormatError, UnsupportedError
from ...storage.base import Storage
from ..base import SPECIAL, ZERO

__all__ = ["RAW", "Extent", "FlatExtent", "NoAccessExtent", "Place", "ZeroExtent"]

RAW = 0  #: the bytes lie at a host offset; the other kinds are those of `entry_at`


class Place(NamedTuple):
    """Where bytes are.

    Attributes:
        kind: `RAW`, or one of the negative answers of `FormatDriver.entry_at`.
        host_offset: Where the first byte is in the extent's storage (RAW), or where the grain
            that it lies in begins (a deflated one); 0 otherwise.
        length: Guest bytes that this holds for, above zero.
    """

    kind: int
    host_offset: int
    length: int


class Extent(ABC):
    """A part of the disk.

    Attributes:
        start: Guest offset of its first byte.
        end: Guest offset behind its last byte.
        storage: Where its bytes are; None where there are none.
        writable: Whether they may be changed.
        type_name: Its type as the descriptor spells it; empty where there is no line for it.
    """

    storage: Storage | None = None
    writable: bool = False
    type_name: str = ""

    def __init__(self, start: int, length: int) -> None:
        self.start = start
        self.end = start + length

    @property
    def unit_bytes(self) -> int:
        """Guest bytes that lie in one piece; units begin at `start`."""
        return self.end - self.start

    @abstractmethod
    def locate(self, guest_offset: int) -> Place:
        """Where the byte at `guest_offset` and some after it are. A plain function.

        The kind is NOT_CACHED if `load` must be awaited first, and MIXED if the table entry is
        wrong: `load` tells what is wrong with it.
        """

    def run(self, guest_offset: int) -> Place:
        """As `locate`, for as many bytes as go on alike and are cheap to look at."""
        return self.locate(guest_offset)

    async def load(self, guest_offset: int) -> None:
        """Bring what `locate` needs into memory.

        Raises:
            CorruptImageError: A table entry on the way is wrong.
        """

    def special_nowait(self, view: memoryview, guest_offset: int) -> bool:
        """Fill `view` from a SPECIAL range if its bytes are in memory. A plain function."""
        return False

    async def read_special(self, view: memoryview, guest_offset: int) -> None:
        """Fill `view` from a SPECIAL range.

        Raises:
            CorruptImageError: The bytes cannot be what was once written.
            UnsupportedError: Nobody may read them.
        """
        raise UnsupportedError("the extent has no special ranges")

    def forget(self) -> None:
        """Forget what was inflated."""

    def refresh(self) -> None:
        """Forget what was read from the storage, which others may have changed.

        Raises:
            FormatError: The storage has become too short.
        """


class FlatExtent(Extent):
    """The bytes lie as they are in a storage, from `host_offset` on.

    Raises:
        FormatError: The storage ends before the extent does.
    """

    def __init__(
        self,
        start: int,
        length: int,
        storage: Storage,
        host_offset: int,
        *,
        writable: bool,
        type_name: str,
    ) -> None:
        super().__init__(start, length)
        self.storage: Storage = storage
        self.writable = writable
        self.type_name = type_name
        self._host_offset = host_offset
        self.refresh()

    def refresh(self) -> None:
        length = self.end - self.start
        missing = self._host_offset + length - self.storage.size()
        if missing > 0:
            raise FormatError(
                f"truncated: the VMDK extent has {length} bytes from offset {self._host_offset} "
                f"on, and {missing} of them are missing",
                filename=self.storage.filename,
            )

    def locate(self, guest_offset: int) -> Place:
        return Place(RAW, guest_offset - self.start + self._host_offset, self.end - guest_offset)


class ZeroExtent(Extent):
    """The bytes read as zero, and have no place where anything else could be written."""

    type_name = "ZERO"

    def locate(self, guest_offset: int) -> Place:
        return Place(ZERO, 0, self.end - guest_offset)


class NoAccessExtent(Extent):
    """The bytes may not be read: they are mapped as special ones, whose reading fails.

    Args:
        start: Guest offset of the first byte.
        length: Bytes of the extent.
        filename: The image's, for errors.
    """

    type_name = "NOACCESS"

    def __init__(self, start: int, length: int, filename: str | None) -> None:
        super().__init__(start, length)
        self._filename = filename

    def locate(self, guest_offset: int) -> Place:
        return Place(SPECIAL, 0, self.end - guest_offset)

    async def read_special(self, view: memoryview, guest_offset: int) -> None:
        raise UnsupportedError(
            f"guest offset {guest_offset} lies in an extent that the descriptor marks NOACCESS",
            filename=self._filename,
        )
