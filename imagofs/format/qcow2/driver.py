"""Qcow2 as a FormatDriver: reading, and the way to what writes."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, Unpack

import trio

from ...errors import CorruptImageError, ImagofsError
from ...gate import ImplicitOpenGate
from ...inflating import InflatedCache
from ...mapping import (
    EofMapping,
    IndirectMapping,
    RawMapping,
    ShallowMapping,
    SpecialMapping,
    ZeroMapping,
)
from ...opening import FROM_HEADER, FromHeader
from ...storage.base import PreallocateMode, Storage, StorageOpenOptions
from ...storage.blockers import RangeLocks
from ..base import (
    IN_PLACE,
    INDIRECT,
    MIXED,
    NOT_CACHED,
    SPECIAL,
    ZERO,
    DiscardTo,
    FormatDriver,
    close_all,
)
from .clusters import (
    COMPRESSED_DATA,
    DATA,
    SUBCLUSTERS,
    UNALLOCATED,
    ZEROES,
    Kind,
    kind_of_cluster,
    kind_of_subcluster,
)
from .compressed import CompressedClusters, NotCompressed
from .entries import COMPRESSED, COPIED, OFFSET_MASK
from .epochs import IoEpochs
from .facts import format_facts
from .header import Header
from .metadata import Metadata

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ...access import FormatAccess
    from ...creating import CreateOptions
    from ...opening import Locking, OpenContext
    from .check_report import CheckResult
    from .check_scan import Progress
    from .writing import Writer

__all__ = ["Qcow2"]

_NO_TABLES = array("Q", bytes(8 * 4096))
_NO_ENTRIES = array("Q", bytes(4096))  # as many as a slice has
#: Smaller clusters (log2 of their bytes) are not lent: a request would have too many for a writev.
_LENDING_BITS = 12


class Qcow2(FormatDriver):
    """One qcow2 image. Made by `Qcow2.open` or by `open_image`."""

    format_name = "qcow2"

    def __init__(
        self,
        metadata: Metadata,
        *,
        size: int,
        writable: bool,
        backing: FormatAccess | None,
        inflated: InflatedCache,
    ) -> None:
        super().__init__()
        header = metadata.header
        self.metadata = metadata
        self.backing = backing
        self.writable = writable
        self.data_storages = (metadata.data_storage,)
        self._storage = metadata.storage
        self._data_storage = metadata.data_storage
        self._size = self._reach = size
        self.resizing = trio.Lock()
        self._l2 = metadata.l2
        self._version = header.version
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._extended = header.extended_l2
        self._data_file = header.has_data_file
        self.granularity = header.cluster_size // (SUBCLUSTERS if self._extended else 1)
        if header.version >= 3 or backing is None:
            self.zero_granularity = header.cluster_size
        self._granule_bits = self.granularity.bit_length() - 1
        #: Guest ranges that are being written, zeroed or discarded.
        self.locks = RangeLocks()
        #: Requests that write, zero or discard: a disk that becomes smaller waits for those that
        #: were let in while it was larger.
        self.changes = IoEpochs()
        self.begin_io = metadata.epochs.begin  # type: ignore[method-assign]
        self.end_io = metadata.epochs.end  # type: ignore[method-assign]
        self._compressed = CompressedClusters(
            self._storage,
            header.cluster_bits,
            header.compression_type,
            inflated,
            self._storage.filename,
            descriptors_nowait=self._descriptors_nowait,
            descriptor=self._descriptor,
            begin_io=metadata.epochs.begin,
            end_io=metadata.epochs.end,
        )
        self._in_place = 0
        self._writer: Writer | None = None
        if writable:
            from .writing import Writer

            self._writer = Writer(self)
            metadata.on_lost = lambda: self.may_write_in_place(False)

    @classmethod
    async def open(
        cls,
        image: str | os.PathLike[str] | Storage,
        *,
        writable: bool = False,
        backing: FormatAccess | FromHeader | None = FROM_HEADER,
        data_file: Storage | FromHeader = FROM_HEADER,
        storage_options: StorageOpenOptions | None = None,
        gate: ImplicitOpenGate | None = None,
        lock: Locking = False,
        snapshot: str | None = None,
    ) -> Qcow2:
        """Open a qcow2 image as a layer that can be put together with others.

        Args:
            image: A path, or an open storage, which the driver owns from then on.
            writable: Open for writing.
            backing: The layer below: `FROM_HEADER` opens what the header names, None opens the
                image as if it named none.
            data_file: The storage of the external data file, if the image has one.
            storage_options: How files are opened; `writable` of it is not looked at.
            gate: Decides on what the image refers to.
            lock: See `open_image`.
            snapshot: Name or ID of an internal snapshot to read.

        Raises:
            As `open_image`.
        """
        from ...opening import layer_storage
        from .loading import load

        async with layer_storage(
            image, writable=writable, options=storage_options, gate=gate, lock=lock
        ) as (storage, context):
            return await load(
                storage,
                context=context,
                writable=writable,
                snapshot=snapshot,
                backing=backing,
                data_file=data_file,
            )

    @classmethod
    async def create(
        cls,
        image: str | os.PathLike[str] | Storage,
        size: int | None = None,
        **options: Unpack[CreateOptions],
    ) -> None:
        """Create a qcow2 image, durably. It is not opened.

        Args:
            image: The file to make, or an empty storage, which stays open and the caller's.
            size: The guest disk's size in bytes, rounded up to a multiple of 512; None: the
                backing file's.
            options: See `CreateOptions`.

        Raises:
            As `create_image`.
        """
        from ...creating import create_qcow2

        await create_qcow2(image, size, **options)

    # --- facts --------------------------------------------------------------------------------

    @property
    def header(self) -> Header:
        """The header as it is now."""
        return self.metadata.header

    def size(self) -> int:
        return self._size

    @property
    def reach(self) -> int:
        """Bytes for which there may be mappings: `size()`, but more while that is changed."""
        return self._reach

    def set_sizes(self, size: int, reach: int) -> None:
        """Set `size()` and `reach`. A plain function."""
        changed = max(self._reach, reach, 1)
        self._size, self._reach = size, reach
        if self._writer is not None:
            self._writer.reach_changed(reach)
        self._changed(0, changed)

    @property
    def storages(self) -> tuple[Storage, ...]:
        if self._data_storage is self._storage:
            return (self._storage,)
        return (self._storage, self._data_storage)

    def details(self) -> dict[str, Any]:
        return format_facts(self.header)

    # --- reading ----------------------------------------------------------------------------

    def entry_at(self, guest_offset: int) -> int:
        l2 = self._l2
        number = guest_offset >> l2.slice_bits
        table = l2.slice_nowait(number) or l2.load_slice_nowait(number)
        if table is None:
            return NOT_CACHED if l2.l1[guest_offset >> l2.l1_bits] & OFFSET_MASK else INDIRECT
        return self._answer(table, guest_offset)

    def entries_at(self, guest_offset: int, granule: int, count: int) -> list[tuple[int, int]]:
        l2 = self._l2
        bits, words = self._cluster_bits, l2.entry_words
        found: list[tuple[int, int]] = []
        end = guest_offset + count * granule
        while guest_offset < end:
            start, number = guest_offset, guest_offset >> l2.slice_bits
            guest_offset = number + 1 << l2.slice_bits
            if guest_offset > end:
                guest_offset = end
            if not l2.l1[start >> l2.l1_bits] & OFFSET_MASK:
                continue
            table = l2.slice_nowait(number) or l2.load_slice_nowait(number)
            if table is None:
                found += [(offset, NOT_CACHED) for offset in range(start, guest_offset, granule)]
                continue
            first = start >> bits & l2.slice_mask
            last = guest_offset - 1 >> bits & l2.slice_mask
            entries = table[first * words : (last + 1) * words]
            # An entry of zeroes is INDIRECT in every kind of image, and most of an overlay's are:
            # they are passed over all at once, or at least without a call for each.
            if entries == _NO_ENTRIES[: len(entries)]:
                continue
            offsets: Iterable[int] = range(start, guest_offset, granule)
            if granule == self._cluster_size:
                offsets = compress(offsets, entries)
            for offset in offsets:
                answer = self._answer(table, offset)
                if answer != INDIRECT:
                    found.append((offset, answer))
        return found

    def _answer(self, table: Sequence[int], guest_offset: int) -> int:
        """What `entry_at` answers from a slice."""
        l2 = self._l2
        index = guest_offset >> self._cluster_bits & l2.slice_mask
        entry = table[index * l2.entry_words]
        if not entry and not self._extended:
            return INDIRECT  # nearly all of an overlay is
        kind = self._kind(entry, table, index, guest_offset)
        if kind == DATA:
            host_offset = entry & OFFSET_MASK
            if self._is_wrong_place(host_offset, guest_offset):
                return MIXED
            in_place = self._in_place if entry & COPIED else 0
            if in_place and self._writer is not None and self._writer.is_metadata(host_offset):
                return MIXED
            return host_offset + (guest_offset & self._cluster_size - 1) | in_place
        if kind == UNALLOCATED:
            return INDIRECT
        if kind == ZEROES:
            return ZERO
        return SPECIAL if kind == COMPRESSED_DATA else MIXED

    def _kind(self, entry: int, table: Sequence[int], index: int, guest_offset: int) -> Kind:
        if not self._extended:
            return kind_of_cluster(entry, version=self._version, data_file=self._data_file)
        number = guest_offset >> self._granule_bits & SUBCLUSTERS - 1
        return kind_of_subcluster(entry, table[2 * index + 1], number, data_file=self._data_file)

    def _is_wrong_place(self, host_offset: int, guest_offset: int) -> bool:
        """Whether a data cluster cannot be at `host_offset`."""
        if self._data_file:
            return host_offset != guest_offset & ~(self._cluster_size - 1)
        return bool(host_offset & self._cluster_size - 1 or host_offset >= self._storage.size())

    async def get_mapping(self, guest_offset: int, max_length: int) -> ShallowMapping:
        length = min(max_length, self._reach - guest_offset)
        if length <= 0:
            return EofMapping()
        l2 = self._l2
        number = guest_offset >> l2.slice_bits
        table = await l2.load_slice(number)
        if table is None:
            return self._no_data(guest_offset, self._empty_length(guest_offset, length))
        end = min(guest_offset + length, number + 1 << l2.slice_bits)
        first = self._piece(table, guest_offset)
        position = (guest_offset | self.granularity - 1) + 1
        while position < end and self._continues(table, first, guest_offset, position):
            position = (position | self.granularity - 1) + 1
        length = min(position, end) - guest_offset
        kind, host_offset, writable = first
        if kind == DATA:
            return RawMapping(length, self._data_storage, host_offset, writable)
        if kind == ZEROES:
            return ZeroMapping(length, explicit=True, allocated=host_offset != 0)
        if kind == COMPRESSED_DATA:
            return SpecialMapping(length, self, guest_offset)
        return self._no_data(guest_offset, length)

    def _no_data(self, guest_offset: int, length: int) -> ShallowMapping:
        if self.backing is None:
            return ZeroMapping(length, explicit=False)
        return IndirectMapping(length, self.backing, guest_offset)

    def _empty_length(self, guest_offset: int, length: int) -> int:
        """Bytes from `guest_offset` on for which there are no L2 tables, up to `length`."""
        l2 = self._l2
        index = (guest_offset >> l2.l1_bits) + 1
        last = guest_offset + length - 1 >> l2.l1_bits
        while index <= last and not l2.l1[index] & OFFSET_MASK:
            # There may be millions; where all of them are 0, they are passed over together.
            many = not index % len(_NO_TABLES) and l2.l1[index : index + len(_NO_TABLES)]
            index += len(_NO_TABLES) if many == _NO_TABLES else 1
        return min((index << l2.l1_bits) - guest_offset, length)

    def _piece(self, table: Sequence[int], guest_offset: int) -> tuple[Kind, int, bool]:
        """Kind, host offset of `guest_offset` itself, and whether it is ours alone.

        Raises:
            CorruptImageError: The entry cannot be right.
        """
        l2 = self._l2
        index = guest_offset >> self._cluster_bits & l2.slice_mask
        entry = table[index * l2.entry_words]
        kind = self._kind(entry, table, index, guest_offset)
        if kind == DATA:
            host_offset = entry & OFFSET_MASK
            if self._is_wrong_place(host_offset, guest_offset):
                raise self.wrong_entry(entry, guest_offset)
            writable = bool(
                self._in_place
                and entry & COPIED
                and not (self._writer is not None and self._writer.is_metadata(host_offset))
            )
            return kind, host_offset + (guest_offset & self._cluster_size - 1), writable
        if kind == ZEROES:
            return kind, entry & OFFSET_MASK, False
        if kind not in (UNALLOCATED, COMPRESSED_DATA):
            raise self.wrong_entry(entry, guest_offset)
        return kind, 0, False

    def _continues(
        self, table: Sequence[int], first: tuple[Kind, int, bool], start: int, position: int
    ) -> bool:
        """Whether what is at `position` prolongs the mapping that began at `start`."""
        try:
            kind, host_offset, writable = self._piece(table, position)
        except CorruptImageError:
            return False
        if kind != first[0]:
            return False
        if kind == DATA:
            return host_offset == first[1] + position - start and writable == first[2]
        return bool(host_offset) == bool(first[1])

    def wrong_entry(self, entry: int, guest_offset: int) -> CorruptImageError:
        """The error for an L2 entry that cannot be right."""
        return CorruptImageError(
            f"the L2 entry {entry:#018x} for guest offset {guest_offset:#x} cannot be right; run "
            f"imagofs check",
            filename=self.filename,
        )

    # --- compressed clusters ------------------------------------------------------------------

    def _descriptors_nowait(self, guest_clusters: range) -> list[int]:
        l2 = self._l2
        words = l2.entry_words
        entries: list[int] = []
        start, end = guest_clusters.start, guest_clusters.stop
        while start < end:
            stop = min(end, (start | l2.slice_mask) + 1)
            table = l2.slice_nowait(start << self._cluster_bits >> l2.slice_bits)
            if table is None:
                entries += [0] * (stop - start)
            else:
                first = (start & l2.slice_mask) * words
                entries += table[first : first + (stop - start) * words : words]
            start = stop
        return [entry if entry & COMPRESSED else 0 for entry in entries]

    async def _descriptor(self, guest_cluster: int) -> int:
        l2 = self._l2
        guest_offset = guest_cluster << self._cluster_bits
        if guest_offset >= self._reach:
            return 0
        table = await l2.load_slice(guest_offset >> l2.slice_bits)
        if table is None:
            return 0
        entry = table[(guest_cluster & l2.slice_mask) * l2.entry_words]
        return entry if entry & COMPRESSED else 0

    def special_nowait(self, view: memoryview, guest_offset: int) -> bool:
        return self._compressed.read_nowait(view, guest_offset)

    async def readv_special(self, views: Sequence[memoryview], guest_offset: int) -> None:
        try:
            await self._compressed.readv(views, guest_offset)
        except NotCompressed:
            if self._writer is None:
                raise
            # Written or discarded since the mapping was looked up.
            await self._writer.read_current(list(views), guest_offset)

    def lend_nowait(self, guest_offset: int, length: int) -> list[Buffer] | None:
        if self._cluster_bits < _LENDING_BITS:
            return None
        return self._compressed.lend_nowait(guest_offset, length)

    async def lend(self, guest_offset: int, length: int) -> list[Buffer] | None:
        if self._cluster_bits < _LENDING_BITS:
            return None
        try:
            return await self._compressed.lend(guest_offset, length)
        except NotCompressed:
            return None

    # --- writing ----------------------------------------------------------------------------

    def may_write_in_place(self, allowed: bool) -> None:
        """Let `entry_at` call clusters IN_PLACE, or no longer. A plain function."""
        self._in_place = IN_PLACE if allowed else 0
        self._changed(0, max(self._reach, 1))

    def mapping_changed(self, guest_offset: int, length: int) -> None:
        """Tell everybody that a mapping changed. A plain function."""
        first = guest_offset >> self._cluster_bits
        last = guest_offset + length - 1 >> self._cluster_bits
        self._compressed.forget(first, last - first + 1)
        self._changed(guest_offset, length)

    def can_write_nowait(self, guest_offset: int, length: int) -> bool:
        return bool(self._in_place) and self.locks.is_free(guest_offset, guest_offset + length)

    def write_nowait(self, view: memoryview, guest_offset: int) -> bool:
        return self._writer is not None and self._writer.write_nowait(view, guest_offset)

    def _writing(self) -> Writer:
        if self._writer is None:
            raise self._read_only()
        return self._writer

    async def writev(self, views: Sequence[memoryview], guest_offset: int) -> None:
        token = self.changes.begin()
        try:
            await self._writing().writev(list(views), guest_offset)
        finally:
            self.changes.end(token)

    async def write_zeroes(self, guest_offset: int, length: int, *, allocate: bool = False) -> None:
        token = self.changes.begin()
        try:
            await self._writing().write_zeroes(guest_offset, length, allocate=allocate)
        finally:
            self.changes.end(token)

    async def discard(self, guest_offset: int, length: int, to: DiscardTo) -> None:
        token = self.changes.begin()
        try:
            await self._writing().discard(guest_offset, length, to)
        finally:
            self.changes.end(token)

    async def ensure_data_mapping(
        self, guest_offset: int, length: int, *, overwrite: bool
    ) -> RawMapping:
        token = self.changes.begin()
        try:
            return await self._writing().ensure_data_mapping(
                guest_offset, length, overwrite=overwrite
            )
        finally:
            self.changes.end(token)

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        writer = self._writing()
        from .resizing import resize

        async with self.resizing:
            await resize(self, writer, size, preallocate)

    # --- durability ---------------------------------------------------------------------------

    async def flush(self) -> None:
        await self._flush(durable=False)

    async def sync(self) -> None:
        await self._flush(durable=True)

    async def _flush(self, *, durable: bool) -> None:
        if not self.writable:
            return
        await self.metadata.flush(durable=durable)

    async def check(self, progress: Progress | None = None) -> CheckResult:
        """Check the image, after a flush if it is open for writing.

        Nothing may be written meanwhile, or what is halfway done is reported as wrong.

        Args:
            progress: Told how many L2 tables of how many are done.

        Raises:
            StorageError: Something cannot be read or written.
        """
        from .check import check_image

        await self.sync()
        return await check_image(self._storage, progress=progress)

    async def invalidate_cache(self) -> None:
        if self.metadata.dirty_bytes():
            raise ImagofsError(
                "there is metadata that was not flushed; flush first", filename=self.filename
            )
        self._l2.cache.drop_namespace(self._l2.namespace)
        self._compressed.forget_all()
        for storage in self.storages:
            await storage.invalidate_cache()
        self._changed(0, max(self._reach, 1))

    async def close(self) -> None:
        try:
            await self._compressed.close()
        finally:
            await close_all(self.storages)


async def open_qcow2(
    storage: Storage, *, context: OpenContext, writable: bool, snapshot: str | None
) -> Qcow2:
    """Open the storage of a chain's layer as qcow2."""
    from .loading import load

    return await load(storage, context=context, writable=writable, snapshot=snapshot)
