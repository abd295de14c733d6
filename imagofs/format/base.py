"""FormatDriver: what a disk-image format offers to `FormatAccess`.

A driver maps guest offsets to places in storages, and changes that mapping. It never opens files
by itself, and never looks below its own layer but for copy on write.

Besides the mapping objects of `mapping.py` there is a cheaper language for the fast path:
`entry_at` answers for one *granule* with a plain integer. An answer of 0 or above says where the
granule's bytes are:

    bits 9 and up   host offset, a multiple of 512
    bit 8           IN_PLACE: the bytes may be overwritten where they are
    bits 0 to 7     index into `data_storages`

and the negative ones are the names below. Any offset that is a multiple of 512 may be asked; the
answer holds from there to the end of the granule it lies in. `entries_at` answers for many.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import trio

from ..errors import ReadOnlyError, UnsupportedError
from ..storage.base import PreallocateMode, Storage

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..access import FormatAccess
    from ..mapping import RawMapping, ShallowMapping

__all__ = [
    "HOST_OFFSET_MASK",
    "INDIRECT",
    "IN_PLACE",
    "MIXED",
    "NOT_CACHED",
    "SPECIAL",
    "STORAGE_MASK",
    "ZERO",
    "DiscardTo",
    "FormatDriver",
    "close_all",
    "unique_storages",
]

STORAGE_MASK = (1 << 8) - 1
IN_PLACE = 1 << 8
HOST_OFFSET_MASK = ~((1 << 9) - 1)

NOT_CACHED = -1  #: the table is not in memory: `await get_mapping` first
INDIRECT = -2  #: the layer below has it (or zeroes, where there is none)
ZERO = -3  #: reads as zero
SPECIAL = -4  #: compressed: `readv_special`
MIXED = -5  #: nothing simple, or an entry that is wrong: ask `get_mapping`


class DiscardTo(enum.Enum):
    """What a discarded range reads as afterwards."""

    ANY = "any"  #: Whatever is cheapest.
    ZERO = "zero"  #: Zeroes.
    BACKING = "backing"  #: The layer below shows through.


class FormatDriver(ABC):
    """One open image, without the layers below it.

    All offsets and lengths are bytes of the guest's disk unless the name says host. Requests
    that arrive here were checked by `FormatAccess`: they lie inside the image and are not empty.
    """

    #: The format's name, as `qemu-img` spells it.
    format_name: str
    #: Whether the image was opened for writing.
    writable: bool = False
    #: The layer below, None where there is none.
    backing: FormatAccess | None = None
    #: Guest bytes per granule of `entry_at`: a power of two, at least 512; as large as can be
    #: (a raw file: 1 << 30); 0: `entry_at` is not offered.
    granularity: int = 0
    #: `write_zeroes` of whole units of this many bytes changes mappings alone; None: it may write
    #: zeroes as data.
    zero_granularity: int | None = None
    #: Storages that `entry_at` indexes and `RawMapping` names.
    data_storages: tuple[Storage, ...] = ()

    def __init__(self) -> None:
        self._listeners: list[Callable[[int, int], None]] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.filename or 'without a file name'}>"

    @classmethod
    async def probe(cls, storage: Storage) -> bool:
        """Whether the first bytes of `storage` are this format's. Anything may be raw.

        Nothing but these bytes is looked at: opening may still fail. An image whose first bytes a
        stranger could write may pretend to be of any format.

        Raises:
            ClosedError: The storage was closed.
            StorageError: It cannot be read.
        """
        from . import FORMATS, PROBE_BYTES

        first_bytes = await storage.read_table(min(PROBE_BYTES, storage.size()), 0)
        return FORMATS[cls.format_name].recognises(bytes(first_bytes))

    @abstractmethod
    def size(self) -> int:
        """The guest disk's size in bytes."""

    @property
    @abstractmethod
    def storages(self) -> tuple[Storage, ...]:
        """Every storage that this layer uses, the image file first."""

    @property
    def filename(self) -> str | None:
        """The image file's name."""
        return self.storages[0].filename if self.storages else None

    # --- reading ----------------------------------------------------------------------------

    def entry_at(self, guest_offset: int) -> int:
        """Where the granule that begins at `guest_offset` is; see the module's text."""
        return MIXED

    def entries_at(self, guest_offset: int, granule: int, count: int) -> list[tuple[int, int]]:
        """What `entry_at` answers for many granules, without those that are INDIRECT.

        A driver that can say of many at a time that it has none of them overrides this.

        Args:
            guest_offset: Where the first granule begins, a multiple of `granule`.
            granule: Bytes from one to the next, a power of two: `granularity` or less, as another
                layer of the chain may have smaller ones.
            count: Granules, above zero. All of them begin inside the image.

        Returns:
            Guest offset and answer of each that is not INDIRECT.
        """
        offsets = range(guest_offset, guest_offset + count * granule, granule)
        answers = [(offset, self.entry_at(offset)) for offset in offsets]
        return [answer for answer in answers if answer[1] != INDIRECT]

    @abstractmethod
    async def get_mapping(self, guest_offset: int, max_length: int) -> ShallowMapping:
        """Where the bytes from `guest_offset` on are, for as long a run as is cheap to say.

        Afterwards the table that covers `guest_offset` is cached, so that `entry_at` answers.

        Returns:
            A mapping with 0 < length <= max_length, or EofMapping at or past the end.

        Raises:
            CorruptImageError: The table entry is wrong.
        """

    def special_nowait(self, view: memoryview, guest_offset: int) -> bool:
        """Fill `view` from a `SPECIAL` range of one or more clusters, if all are in memory."""
        return False

    async def readv_special(self, views: Sequence[memoryview], guest_offset: int) -> None:
        """Fill `views` from a range that is mapped as `SpecialMapping`."""
        raise UnsupportedError(f"{self.format_name} has no special mappings")

    # --- I/O in flight ------------------------------------------------------------------------

    def lend_nowait(self, guest_offset: int, length: int) -> list[Buffer] | None:
        """The bytes of a SPECIAL range as they lie in memory. A plain function.

        Returns:
            Buffers that never change, one after the other; an empty list if the bytes are not in
            memory (then ask `lend`); None if this layer does not lend.
        """
        return None

    async def lend(self, guest_offset: int, length: int) -> list[Buffer] | None:
        """As `lend_nowait`, once the bytes are in memory.

        Returns:
            None: ask `readv_special`.

        Raises:
            As `readv_special`.
        """
        return None

    def begin_io(self) -> int:
        """Note that a read begins whose host offsets must stay what they are; return a token.

        Host space that is freed meanwhile is neither reused nor punched before `end_io`.
        """
        return 0

    def end_io(self, token: int) -> None:
        """Note that the read that `begin_io` returned `token` for has ended."""

    # --- writing ----------------------------------------------------------------------------

    def can_write_nowait(self, guest_offset: int, length: int) -> bool:
        """Whether no operation in flight overlaps, so that an IN_PLACE range may be written."""
        return False

    def write_nowait(self, view: memoryview, guest_offset: int) -> bool:
        """Write the flat `view` with what allocation it takes, if nothing needs waiting.

        Returns:
            False: the guest's contents are as before, or partly new; give all of it to `writev`.
        """
        return False

    async def writev(self, views: Sequence[memoryview], guest_offset: int) -> None:
        """Write `views`, allocating and copying where needed.

        The new contents become visible only once they are in place. A failed or cancelled write
        leaves, for each sector, the old or the new contents.
        """
        raise self._read_only()

    async def write_zeroes(self, guest_offset: int, length: int, *, allocate: bool = False) -> None:
        """Make the range read as zero; with `allocate`, keep or take host space for it."""
        raise self._read_only()

    async def discard(self, guest_offset: int, length: int, to: DiscardTo) -> None:
        """Give space back. Partial clusters at the edges follow `to` where it demands contents."""
        raise self._read_only()

    async def ensure_data_mapping(
        self, guest_offset: int, length: int, *, overwrite: bool
    ) -> RawMapping:
        """Map (a first part of) the range to host bytes that may be written directly.

        Args:
            guest_offset: Where the range starts.
            length: Bytes wanted, above zero.
            overwrite: The caller will write all of the mapping, so that its old contents need
                not be kept.

        Returns:
            A writable mapping with 0 < length.
        """
        raise self._read_only()

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        """Set the guest disk's size in bytes."""
        raise self._read_only()

    # --- durability ---------------------------------------------------------------------------

    @abstractmethod
    async def flush(self) -> None:
        """Write cached metadata to the image file, so that another reader finds everything."""

    @abstractmethod
    async def sync(self) -> None:
        """Flush, and make everything durable."""

    @abstractmethod
    async def invalidate_cache(self) -> None:
        """Forget clean cached metadata, so that changes by others are seen.

        Raises:
            ImagofsError: There is metadata that was not flushed.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close this layer's storages, not the layer below. Does not flush."""

    # --- facts --------------------------------------------------------------------------------

    def allocated_bytes(self) -> int:
        """Bytes of host space that this layer's guest data may take, for st_blocks.

        The host's own figure for the image's files is good enough and cheap.
        """
        return sum(storage.allocated_bytes() for storage in self.storages)

    def details(self) -> dict[str, Any]:
        """The format's own facts for `imagofs info`, as JSON values."""
        return {}

    # --- changes of the mapping -----------------------------------------------------------------

    def subscribe(self, listener: Callable[[int, int], None]) -> None:
        """Call `listener(guest_offset, length)`, a plain function, whenever a mapping changes."""
        self._listeners.append(listener)

    def _changed(self, guest_offset: int, length: int) -> None:
        for listener in self._listeners:
            listener(guest_offset, length)

    def _read_only(self) -> Exception:
        if self.writable:
            return UnsupportedError(f"{self.format_name} cannot do this", filename=self.filename)
        return ReadOnlyError("the image is open read-only", filename=self.filename)


def unique_storages(drivers: Iterable[FormatDriver]) -> tuple[Storage, ...]:
    """Every storage of `drivers`, each once, in order."""
    return tuple(dict.fromkeys(storage for driver in drivers for storage in driver.storages))


async def close_all(storages: Sequence[Storage]) -> None:
    """Close every storage, even if closing one fails; the first failure is raised."""
    failure: Exception | None = None
    with trio.CancelScope(shield=True):
        for storage in storages:
            try:
                await storage.close()
            except Exception as exc:
                failure = failure or exc
    if failure is not None:
        raise failure
