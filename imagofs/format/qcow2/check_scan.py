"""Following every reference of an image, counting the references of each host cluster.

`Scan` reads the active L1 table, the snapshots' and all L2 tables, compressed clusters included,
the snapshot table and the bitmaps, and says what cannot be right about them. A table that is
misplaced or lies over another one is not followed. A table that several states share is read
once, and counts as often as it is referred to.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import trio

from ...errors import FormatError, UnsupportedError
from ...storage.base import Storage
from .bitmaps import Bitmap, read_bitmaps
from .check_counts import Counts, StoredCounts, read_bytes, read_table
from .check_header import wrong_fields
from .check_l2 import L2Walk
from .check_numpy import Vectorised, can_be_flat
from .check_report import Kind, Report
from .entries import COPIED, L1_RESERVED, OFFSET_MASK, REFTABLE_RESERVED, from_big_endian
from .header import MAX_L1_BYTES, Header
from .snapshots import Snapshot, read_snapshots

__all__ = ["Progress", "Scan", "State", "Table"]

#: Called with what is done and what there is to do, in L2 tables.
Progress = Callable[[int, int], None]

_TABLES_PER_TURN = 64
#: Clusters of metadata that are followed though they take no room in the file: a hostile image of
#: a few KiB may name billions of them.
_FOR_NOTHING = 1 << 17
#: Bitmap table entries: bits 1 to 8 and 56 to 63 are reserved; bit 0 only counts without offset.
_BITMAP_RESERVED = (1 << 9) - (1 << 1) | (1 << 64) - (1 << 56)


@dataclass(slots=True)
class State:
    """The active state of the disk, or a snapshot.

    Attributes:
        name: The snapshot's name, None for the active state.
        snapshot: Its number in the snapshot table, None for the active state.
        l1_offset: Host offset of the L1 table.
        l1: The L1 table's entries, up to the last that is not 0.
    """

    name: str | None
    snapshot: int | None
    l1_offset: int
    l1: array[int]

    def __str__(self) -> str:
        return "the L1 table" if self.name is None else f"the L1 table of snapshot {self.name!r}"


@dataclass(slots=True)
class Table:
    """An L2 table that is referred to.

    Attributes:
        times: How often.
        active: How often by the active state.
        state: Index of the first state that does.
        l1_index: The entry of that state's L1 table.
    """

    times: int
    active: int
    state: int
    l1_index: int


BITMAP_DIRECTORY = "the bitmap directory"


def bitmap_table(bitmap: Bitmap) -> str:
    """What the table of a bitmap is called in messages."""
    return f"the table of bitmap {bitmap.name!r}"


def bitmap_data(bitmap: Bitmap) -> str:
    """What the clusters of a bitmap are called in messages."""
    return f"bitmap {bitmap.name!r}"


def incomplete_extra_data(header: Header, snapshot: Snapshot) -> bool:
    """Whether the entry of a snapshot lacks what version 3 asks for."""
    return header.version >= 3 and snapshot.extra_length < 16


class Scan:
    """One walk over everything that the image refers to.

    Args:
        storage: The image file; only read.
        header: Its header.
        report: Where findings go.
        stored: The stored refcounts, loaded, to compare COPIED flags with; None leaves the flags
            alone.
        progress: Told how far the walk is.
    """

    def __init__(
        self,
        storage: Storage,
        header: Header,
        report: Report,
        *,
        stored: StoredCounts | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.storage = storage
        self.header = header
        self.report = report
        self.stored = stored
        self._progress = progress
        self.size = storage.size()
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.clusters = self.size + header.cluster_size - 1 >> header.cluster_bits
        flat = stored.flat is not None if stored is not None else can_be_flat(storage, header)
        self.counts = Counts(header, self.clusters, flat=flat, storage=storage)
        self._vectorised = Vectorised(self) if flat else None
        #: Clusters of metadata that may still be met. All that is not in a hole has its room.
        self._room = _FOR_NOTHING + (storage.allocated_bytes() >> header.cluster_bits)
        #: What metadata each host cluster holds.
        self.own: dict[int, str] = {}
        #: Metadata clusters that something else lies in too, and what.
        self.overlaps: dict[int, str] = {}
        self.states: list[State] = []
        self.snapshots: list[Snapshot] = []
        self.bitmaps: list[Bitmap] = []
        #: L2 tables by host offset.
        self.tables: dict[int, Table] = {}
        #: Whether there is a table that was not followed: what only it refers to seems leaked.
        self.incomplete = False
        self.allocated = self.fragmented = self.compressed = 0

    async def run(self) -> None:
        """Follow everything but the refcount table and its blocks.

        Raises:
            UnsupportedError: More is referred to than there can be; it would take too much memory.
            StorageError: Something cannot be read.
        """
        header = self.header
        for wrong in wrong_fields(header):
            self.report.corruption(Kind.HEADER, wrong)
        self._mark("the header", 0, header.cluster_size)
        self._mark("the L1 table", header.l1_offset, header.l1_entries * 8)
        l1 = await self._read_l1(header.l1_offset, header.l1_entries)
        self.states.append(State(None, None, header.l1_offset, l1))
        await self._read_snapshots()
        for number, state in enumerate(self.states):
            self._follow_l1(number, state)
        await self._read_bitmaps()
        total = len(self.tables)
        for done, (offset, table) in enumerate(sorted(self.tables.items()), 1):
            await self._follow_l2(offset, table)
            if not done % _TABLES_PER_TURN:
                await trio.lowlevel.checkpoint()
                if self._progress is not None:
                    self._progress(done, total)
        if self._progress is not None:
            self._progress(total, total)

    async def _read_l1(self, offset: int, entries: int) -> array[int]:
        """An L1 table without the zeroes at its end: it may be large in name only."""
        data = await read_bytes(self.storage, offset, entries * 8)
        used = len(data.rstrip(b"\0"))
        return from_big_endian(memoryview(data)[: used + -used % 8])

    # --- metadata -----------------------------------------------------------------------------

    def _mark(
        self,
        what: str,
        offset: int,
        length: int,
        *,
        kind: Kind = Kind.ENTRY,
        guest_offset: int | None = None,
    ) -> bool:
        """Count a stretch of metadata; whether it is in the file and alone in its clusters."""
        if length <= 0:
            return True
        if self.is_beyond(offset, length):
            self.report.corruption(
                kind,
                f"{what} ({length} bytes at {offset:#x}) reaches past the end of the file",
                host_offset=offset,
                guest_offset=guest_offset,
            )
            return False
        first = offset >> self.cluster_bits
        last = offset + length - 1 >> self.cluster_bits
        self._room -= last - first + 1
        if self._room < 0:
            raise UnsupportedError(
                f"its tables lie over each other, or name more clusters than there is room for in "
                f"the file: {what} ({length} bytes at {offset:#x}) is too much to be followed",
                filename=self.storage.filename,
            )
        self.counts.add(first, last - first + 1)
        own, alone = self.own, True
        for cluster in range(first, last + 1):
            if cluster in own:
                self.overlaps.setdefault(cluster, what)
                alone = False
            else:
                own[cluster] = what
        return alone

    def is_beyond(self, offset: int, length: int) -> bool:
        """Whether a stretch ends behind the end of the file."""
        # The last cluster of a file may be there in part only.
        return offset + length - 1 >> self.cluster_bits >= self.clusters

    async def _read_snapshots(self) -> None:
        header, report = self.header, self.report
        if not header.snapshot_count:
            return
        try:
            self.snapshots = await read_snapshots(self.storage, header)
        except FormatError as exc:
            self.incomplete = True
            report.corruption(
                Kind.SNAPSHOT,
                f"the snapshot table at {header.snapshots_offset:#x} is broken: {exc.message}",
                host_offset=header.snapshots_offset,
            )
            return
        last = self.snapshots[-1]
        self._mark("the snapshot table", header.snapshots_offset, last.entry_offset + last.length)
        for number, snapshot in enumerate(self.snapshots):
            if incomplete_extra_data(header, snapshot):
                report.corruption(
                    Kind.SNAPSHOT, f"the entry of snapshot {snapshot.name!r} is incomplete"
                )
            what = f"the L1 table of snapshot {snapshot.name!r}"
            length = snapshot.l1_entries * 8
            if not snapshot.l1_offset:
                wrong = "lies over the header"
            elif snapshot.l1_offset & self.cluster_size - 1:
                wrong = "is not at the beginning of a cluster"
            elif length > MAX_L1_BYTES:
                wrong = f"has {snapshot.l1_entries} entries"
            elif self._mark(what, snapshot.l1_offset, length):
                l1 = await self._read_l1(snapshot.l1_offset, snapshot.l1_entries)
                self.states.append(State(snapshot.name, number, snapshot.l1_offset, l1))
                continue
            else:
                self.incomplete = True
                continue
            self.incomplete = True
            report.corruption(
                Kind.SNAPSHOT,
                f"{what} (at {snapshot.l1_offset:#x}) {wrong}",
                host_offset=snapshot.l1_offset,
            )

    def _follow_l1(self, number: int, state: State) -> None:
        for index, entry in enumerate(state.l1):
            if not entry:
                continue
            if entry & L1_RESERVED:
                self.report.corruption(
                    Kind.ENTRY,
                    f"entry {index} of {state} has reserved bits set: {entry:#018x}",
                    guest_offset=self.guest_offset(index),
                )
            offset = entry & OFFSET_MASK
            if not offset:
                if entry & COPIED:
                    self.report.corruption(
                        Kind.ENTRY,
                        f"entry {index} of {state} has a COPIED flag and no table",
                        guest_offset=self.guest_offset(index),
                    )
                continue
            if not number:
                self._check_l1_copied(index, entry, offset >> self.cluster_bits)
            if offset & self.cluster_size - 1:
                self._misaligned_table(index, state, offset)
                continue
            table = self.tables.get(offset)
            if table is not None:
                table.times += 1
                self.counts.add(offset >> self.cluster_bits, 1)
            elif self._mark(
                "an L2 table", offset, self.cluster_size, guest_offset=self.guest_offset(index)
            ):
                table = self.tables[offset] = Table(1, 0, number, index)
            else:
                self.incomplete = True
                continue
            if not number:
                table.active += 1

    def _misaligned_table(self, index: int, state: State, offset: int) -> None:
        self.incomplete = True
        what = f"entry {index} of {state} points to {offset:#x}"
        for wrong in ("not to the beginning of a cluster", "behind the end of the file"):
            self.report.corruption(
                Kind.ENTRY, f"{what}, {wrong}", guest_offset=self.guest_offset(index)
            )
            if not self.is_beyond(offset, self.cluster_size):
                self.counts.add(offset >> self.cluster_bits, 2)
                break

    def _check_l1_copied(self, index: int, entry: int, cluster: int) -> None:
        if self.stored is None or self.stored.is_unreadable(cluster):
            return
        count = self.stored.get(cluster)
        if (count == 1) != bool(entry & COPIED):
            self.report.corruption(
                Kind.COPIED,
                f"entry {index} of the L1 table ({entry:#018x}) has "
                f"{'' if entry & COPIED else 'no '}COPIED flag, the refcount is {count}",
                guest_offset=self.guest_offset(index),
            )

    def guest_offset(self, l1_index: int, index: int = 0) -> int:
        """Guest offset of an entry of the L2 table of an L1 entry."""
        return (l1_index << self.header.l2_bits) + index << self.cluster_bits

    def disk_size(self, state: State) -> int:
        """Bytes of the disk in a state."""
        if state.snapshot is None:
            return self.header.size
        return self.snapshots[state.snapshot].disk_size

    async def _read_bitmaps(self) -> None:
        extension = self.header.bitmaps
        if extension is None:
            return
        report = self.report
        place, length = extension.directory_offset, extension.directory_size
        self._mark(BITMAP_DIRECTORY, place, length, kind=Kind.BITMAP)
        try:
            self.bitmaps = await read_bitmaps(self.storage, self.header)
        except FormatError as exc:
            self.incomplete = True
            report.error(Kind.BITMAP, f"the bitmap directory is broken: {exc.message}")
            return
        for bitmap in self.bitmaps:
            what = bitmap_table(bitmap)
            length = bitmap.table_entries * 8
            if bitmap.table_offset & self.cluster_size - 1 or length > self.size:
                self.incomplete = True
                report.error(Kind.BITMAP, f"{what} (at {bitmap.table_offset:#x}) is misplaced")
            elif self._mark(what, bitmap.table_offset, length, kind=Kind.BITMAP):
                table = await read_table(self.storage, bitmap.table_offset, bitmap.table_entries)
                self._follow_bitmap(bitmap, table)
            else:
                self.incomplete = True

    def _follow_bitmap(self, bitmap: Bitmap, table: array[int]) -> None:
        for index, entry in enumerate(table):
            offset = entry & OFFSET_MASK
            if not self._is_sound_bitmap_entry(entry):
                self.report.corruption(
                    Kind.BITMAP,
                    f"entry {index} of {bitmap_table(bitmap)} cannot be right: {entry:#018x}",
                )
            elif offset:
                self._mark(bitmap_data(bitmap), offset, self.cluster_size, kind=Kind.BITMAP)

    def _is_sound_bitmap_entry(self, entry: int) -> bool:
        offset = entry & OFFSET_MASK
        return not entry & _BITMAP_RESERVED and not (
            offset and (entry & 1 or offset & self.cluster_size - 1)
        )

    def is_bitmap_entry_usable(self, bitmap: Bitmap, entry: int) -> bool:
        """Whether an entry of a bitmap's table is possible, and its cluster the bitmap's alone."""
        if not self._is_sound_bitmap_entry(entry):
            return False
        offset = entry & OFFSET_MASK
        return not offset or self.is_alone(bitmap_data(bitmap), offset, self.cluster_size)

    def is_alone(self, what: str, offset: int, length: int) -> bool:
        """Whether a stretch is in the file, belongs to `what`, and nothing else lies over it."""
        if offset & self.cluster_size - 1 or self.is_beyond(offset, length):
            return False
        clusters = range(
            offset >> self.cluster_bits, (offset + length - 1 >> self.cluster_bits) + 1
        )
        return all(
            self.own.get(cluster) == what and cluster not in self.overlaps for cluster in clusters
        )

    # --- L2 tables ----------------------------------------------------------------------------

    async def _follow_l2(self, offset: int, table: Table) -> None:
        data = await read_bytes(self.storage, offset, self.cluster_size)
        walk = L2Walk(self, offset, table)
        if self._vectorised is not None and self._vectorised.follow(data, walk, table):
            return
        used = len(data.rstrip(b"\0"))
        size = self.header.l2_entry_size
        words = from_big_endian(memoryview(data)[: used + -used % size])
        if size == 8:
            walk.follow(words)
        else:
            walk.follow(words[0::2], words[1::2])

    # --- the refcount structure ---------------------------------------------------------------

    def mark_structure(self, table: array[int]) -> bool:
        """Count the refcount table and its blocks, after everything else.

        Args:
            table: The refcount table's entries.

        Returns:
            Whether all of it is where it can be. If not, it must be made anew.
        """
        header, report = self.header, self.report
        sound = self._mark(
            "the refcount table",
            header.reftable_offset,
            header.reftable_clusters * self.cluster_size,
        )
        first = header.reftable_offset >> self.cluster_bits
        for cluster in range(first, first + header.reftable_clusters):
            if self.counts.get(cluster) != 1:
                self.overlaps.setdefault(cluster, "something else")
                sound = False
        blocks: list[tuple[int, int]] = []
        for index, entry in enumerate(table):
            if not entry:
                continue
            wrong = ""
            if entry & REFTABLE_RESERVED:
                wrong = f"has reserved bits set: {entry:#018x}"
            elif entry & self.cluster_size - 1:
                wrong = f"points to {entry:#x}, not to the beginning of a cluster"
            elif entry >> self.cluster_bits >= self.clusters:
                wrong = f"points to {entry:#x}, behind the end of the file"
            if wrong:
                report.corruption(Kind.STRUCTURE, f"entry {index} of the refcount table {wrong}")
                sound = False
            else:
                self.counts.add(entry >> self.cluster_bits, 1)
                blocks.append((index, entry >> self.cluster_bits))
        for index, cluster in blocks:
            if cluster not in self.own:
                self.own[cluster] = "a refcount block"
            count = self.counts.get(cluster)
            if count != 1:
                report.corruption(
                    Kind.STRUCTURE,
                    f"refcount block {index} at {cluster << self.cluster_bits:#x} is used "
                    f"{count} times",
                    host_offset=cluster << self.cluster_bits,
                )
                sound = False
        return sound
