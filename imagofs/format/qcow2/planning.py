"""What a write means cluster by cluster: decided in plain functions, before any I/O.

A plan says which bytes go where in the host file (pieces), and which L2 entries change once they
are there (changes). Making a plan allocates host clusters and changes nothing else; a plan that
is given up gives them back.
"""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from ...errors import CorruptImageError
from .clusters import ALLOCATED_BITS, SUBCLUSTERS, ZERO_SHIFT
from .entries import COMPRESSED, COPIED, OFFSET_MASK, READS_AS_ZERO, compressed_range
from .metadata import Metadata
from .refcounts import HostRun

__all__ = ["Change", "Piece", "Plan", "Planner", "Source", "WriteInstead"]


class Source(enum.Enum):
    """Where the bytes of a piece come from."""

    REQUEST = 0  #: The caller's buffers.
    OLD = 1  #: What the guest reads there now.
    ZERO = 2


class Piece(NamedTuple):
    """Bytes to write. `guest_offset` and `host_offset` belong together."""

    guest_offset: int
    host_offset: int
    length: int
    source: Source


class Change(NamedTuple):
    """L2 entries to set, one after the other, once the pieces are written.

    Attributes:
        guest_offset: Of the first one's cluster.
        clusters: How many. All lie in one slice.
        words: The entries; with extended L2 each is followed by its bitmap.
    """

    guest_offset: int
    clusters: int
    words: array[int]


@dataclass(slots=True)
class Plan:
    """What a write does. Host clusters are given by number, offsets in bytes."""

    pieces: list[Piece] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    allocated: list[HostRun] = field(default_factory=list)
    #: Host clusters that lose a reference, each as often as it loses one.
    dropped: list[int] = field(default_factory=list)

    def add(self, guest_offset: int, host_offset: int, length: int, source: Source) -> None:
        """Append a piece, as part of the one before if it only prolongs it."""
        if not length:
            return
        if self.pieces:
            last = self.pieces[-1]
            if (
                last.source is source
                and last.guest_offset + last.length == guest_offset
                and last.host_offset + last.length == host_offset
            ):
                self.pieces[-1] = last._replace(length=last.length + length)
                return
        self.pieces.append(Piece(guest_offset, host_offset, length, source))


class _Old(NamedTuple):
    """One cluster as it is before the change."""

    guest_offset: int  # of its first byte
    entry: int
    bitmap: int

    @property
    def host_offset(self) -> int:
        """Host offset, 0 for none; not for compressed ones."""
        return 0 if self.entry & COMPRESSED else self.entry & OFFSET_MASK


class Planner:
    """Makes plans for one image. Every method is a plain function.

    The range of a plan lies in one L2 slice, and its L2 table is ours alone.

    Args:
        metadata: The image's tables.
        has_backing: Whether unallocated clusters may show anything but zeroes.
    """

    def __init__(self, metadata: Metadata, *, has_backing: bool) -> None:
        header = metadata.header
        self._metadata = metadata
        self._l2 = metadata.l2
        self._refcounts = metadata.refcounts
        self._has_backing = has_backing
        self._version = header.version
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._extended = header.extended_l2
        self._data_file = header.has_data_file
        self.set_reach(header.size)
        self._subcluster_size = header.cluster_size // SUBCLUSTERS
        self._filename = metadata.storage.filename

    def set_reach(self, reach: int) -> None:
        """Say where the last cluster that is written ends."""
        # A data file has no more bytes than the disk; an image file has whole clusters.
        self._end = reach if self._data_file else 1 << 64

    # --- what is there --------------------------------------------------------------------------

    def _old(self, guest_offset: int) -> _Old:
        """The cluster that `guest_offset` lies in, checked.

        Raises:
            Missing: Its slice is not in memory.
            CorruptImageError: The entry cannot be right, or points into the metadata.
        """
        l2 = self._l2
        table = l2.need_slice(guest_offset >> l2.slice_bits)
        index = (guest_offset >> self._cluster_bits & l2.slice_mask) * l2.entry_words
        start = guest_offset >> self._cluster_bits << self._cluster_bits
        old = _Old(start, table[index], table[index + 1] if self._extended else 0)
        if self._is_wrong(old):
            raise self._wrong(old)
        return old

    def _wrong(self, old: _Old) -> CorruptImageError:
        return CorruptImageError(
            f"the L2 entry {old.entry:#018x} for guest offset {old.guest_offset:#x} cannot be "
            f"right, so nothing is written there; run imagofs check",
            filename=self._filename,
        )

    def _is_wrong(self, old: _Old) -> bool:
        if old.entry & COMPRESSED:
            return bool(self._data_file or old.bitmap)
        if old.entry & READS_AS_ZERO and (self._version < 3 or self._extended):
            return True
        if old.bitmap & old.bitmap >> ZERO_SHIFT & ALLOCATED_BITS:
            return True
        host_offset = old.host_offset
        if self._data_file:
            if self._has_data(old) or host_offset:
                return host_offset != old.guest_offset
            return False
        if host_offset & self._cluster_size - 1 or self._metadata.is_own(host_offset):
            return bool(host_offset)
        return self._has_data(old) and host_offset >= self._metadata.storage.size()

    def _has_data(self, old: _Old) -> bool:
        """Whether bytes of the cluster's host space are shown to the guest."""
        if old.entry & (COMPRESSED | READS_AS_ZERO):
            return False
        if not old.host_offset and not (self._data_file and old.entry & COPIED):
            return False
        return bool(old.bitmap & ALLOCATED_BITS) if self._extended else True

    def _is_ours(self, old: _Old) -> bool:
        """Whether the cluster has host space that is ours alone and may be written to."""
        if self._data_file:
            return bool(old.entry & COPIED) and old.host_offset == old.guest_offset
        return bool(
            old.entry & COPIED
            and old.host_offset
            and old.host_offset < self._metadata.storage.size()
        )

    def _reads_as_zero(self, old: _Old) -> bool:
        """Whether the whole cluster is known to read as zero."""
        if self._extended:
            if old.entry & COMPRESSED or old.bitmap & ALLOCATED_BITS:
                return False
            return not self._has_backing or old.bitmap >> ZERO_SHIFT == ALLOCATED_BITS
        if old.entry & READS_AS_ZERO and not old.entry & COMPRESSED:
            return True
        return not self._has_backing and self._is_unallocated(old)

    def _is_unallocated(self, old: _Old) -> bool:
        if old.entry & (COMPRESSED | READS_AS_ZERO) or old.bitmap:
            return False
        return not old.host_offset and not (self._data_file and old.entry & COPIED)

    def _drop(self, plan: Plan, old: _Old) -> None:
        """Take away the references that the old entry makes."""
        if self._data_file:
            return
        if old.entry & COMPRESSED:
            place = compressed_range(old.entry, self._cluster_bits)
            first = place.host_offset >> self._cluster_bits
            last = place.host_offset + place.length - 1 >> self._cluster_bits
            clusters = list(range(first, last + 1))
        elif old.host_offset:
            clusters = [old.host_offset >> self._cluster_bits]
        else:
            return
        for cluster in clusters:
            if cluster in self._metadata.own:
                raise self._wrong(old)
            self._refcounts.check_reference(cluster, old.guest_offset)
        plan.dropped += clusters

    def _set(self, plan: Plan, old: _Old, entry: int, bitmap: int = 0) -> None:
        """Change one entry; `bitmap` counts with extended L2 only."""
        words = array("Q", (entry, bitmap) if self._extended else (entry,))
        plan.changes.append(Change(old.guest_offset, 1, words))

    # --- writing --------------------------------------------------------------------------------

    def write(self, guest_offset: int, length: int, source: Source = Source.REQUEST) -> Plan:
        """Plan to put `length` bytes of `source` at `guest_offset`.

        Raises:
            Missing: A table is not in memory; nothing was changed.
            TableFull: The refcount table must grow first; nothing was changed.
            CorruptImageError: An entry is wrong; nothing was changed.
        """
        plan = Plan()
        if self._write_untouched(plan, guest_offset, guest_offset + length, source):
            return plan
        olds = []
        position, end = guest_offset, guest_offset + length
        while position < end:
            old = self._old(position)
            olds.append(old)
            if not self._is_ours(old):
                self._drop(plan, old)
            position = old.guest_offset + self._cluster_size
        new = [old for old in olds if not self._is_ours(old)]
        hosts = iter(self._allocate(plan, [old.guest_offset for old in new]))
        for old in olds:
            start = max(guest_offset, old.guest_offset)
            stop = min(end, old.guest_offset + self._cluster_size, self._end)
            if self._is_ours(old):
                self._write_ours(plan, old, start, stop, source)
            else:
                self._write_new(plan, old, start, stop, source, *next(hosts))
        return plan

    def _write_untouched(self, plan: Plan, start: int, end: int, source: Source) -> bool:
        """Into new clusters where nothing is, and nothing below counts: all of them at once.

        This is how most new data comes. What it does, the other methods would do too.

        Returns:
            False: something is there; the plan is empty.
        """
        if self._extended or self._data_file:
            return False
        mask = self._cluster_size - 1
        if self._has_backing and (start | end) & mask:
            return False
        l2, bits = self._l2, self._cluster_bits
        first = start >> bits
        count = (end - 1 >> bits) - first + 1
        index = first & l2.slice_mask
        table = l2.need_slice(start >> l2.slice_bits)
        if any(table[index : index + count]):
            return False
        plan.allocated = self._refcounts.allocate(count)
        position = first << bits
        for host_cluster, count in plan.allocated:
            host_offset, stop = host_cluster << bits, position + (count << bits)
            shift = host_offset - position
            head, tail = max(start, position), min(end, stop)
            virgin = self._refcounts.take_virgin(host_cluster, count)
            if not virgin:
                plan.add(position, host_offset, head - position, Source.ZERO)
            plan.add(head, head + shift, tail - head, source)
            if not virgin:
                plan.add(tail, tail + shift, stop - tail, Source.ZERO)
            entries = range(host_offset | COPIED, stop + shift | COPIED, self._cluster_size)
            plan.changes.append(Change(position, count, array("Q", entries)))
            position = stop
        return True

    def _allocate(self, plan: Plan, guest_offsets: list[int]) -> list[tuple[int, bool]]:
        """(host offset, whether it reads as zero) for each guest cluster, in order."""
        if self._data_file:
            return [(guest_offset, False) for guest_offset in guest_offsets]
        if not guest_offsets:
            return []
        plan.allocated = self._refcounts.allocate(len(guest_offsets))
        hosts = []
        for first, count in plan.allocated:
            virgin = self._refcounts.take_virgin(first, count)
            hosts += [
                (cluster << self._cluster_bits, virgin) for cluster in range(first, first + count)
            ]
        return hosts

    def _write_ours(self, plan: Plan, old: _Old, start: int, stop: int, source: Source) -> None:
        """Into host space that is ours: only what is touched, with the edges that hold garbage."""
        shift = old.host_offset - old.guest_offset
        cluster_end = min(old.guest_offset + self._cluster_size, self._end)
        if not self._extended:
            if not old.entry & READS_AS_ZERO:
                plan.add(start, start + shift, stop - start, source)
                return
            head, tail = old.guest_offset, cluster_end
            entry, bitmap = old.entry & ~READS_AS_ZERO, 0
            edge = Source.ZERO
        else:
            first, last = self._subclusters(old, start, stop)
            head, tail = start, stop
            if not old.bitmap >> first & 1:
                head = old.guest_offset + first * self._subcluster_size
            if not old.bitmap >> last & 1:
                tail = min(old.guest_offset + (last + 1) * self._subcluster_size, self._end)
            entry, bitmap = old.entry, _with_allocated(old.bitmap, first, last)
            edge = Source.OLD
        plan.add(head, head + shift, start - head, edge)
        plan.add(start, start + shift, stop - start, source)
        plan.add(stop, stop + shift, tail - stop, edge)
        if entry != old.entry or bitmap != old.bitmap:
            self._set(plan, old, entry, bitmap)

    def _write_new(
        self,
        plan: Plan,
        old: _Old,
        start: int,
        stop: int,
        source: Source,
        host_offset: int,
        virgin: bool,
    ) -> None:
        """Into a new host cluster: with all that the old one had and the new one must have."""
        shift = host_offset - old.guest_offset
        cluster_end = min(old.guest_offset + self._cluster_size, self._end)
        if self._extended and not old.entry & COMPRESSED:
            self._write_new_subclusters(plan, old, start, stop, source, host_offset)
            return
        edge = Source.OLD
        head, tail = old.guest_offset, cluster_end
        if self._reads_as_zero(old):
            edge = Source.ZERO
            if virgin:
                head, tail = start, stop
        plan.add(head, head + shift, start - head, edge)
        plan.add(start, start + shift, stop - start, source)
        plan.add(stop, stop + shift, tail - stop, edge)
        bitmap = ALLOCATED_BITS if self._extended else 0
        self._set(plan, old, host_offset | COPIED, bitmap)

    def _write_new_subclusters(
        self, plan: Plan, old: _Old, start: int, stop: int, source: Source, host_offset: int
    ) -> None:
        shift = host_offset - old.guest_offset
        first, last = self._subclusters(old, start, stop)
        size = self._subcluster_size
        for number in range(SUBCLUSTERS):
            head = old.guest_offset + number * size
            if number == first:
                plan.add(head, head + shift, start - head, Source.OLD)
                plan.add(start, start + shift, stop - start, source)
            if number == last:
                tail = min(head + size, self._end)
                plan.add(stop, stop + shift, tail - stop, Source.OLD)
            if not first <= number <= last and old.bitmap >> number & 1:
                plan.add(head, head + shift, size, Source.OLD)
        bitmap = _with_allocated(old.bitmap, first, last)
        self._set(plan, old, host_offset | COPIED, bitmap)

    def _subclusters(self, old: _Old, start: int, stop: int) -> tuple[int, int]:
        """Numbers of the first and the last subcluster that a range touches."""
        size = self._subcluster_size
        return (start - old.guest_offset) // size, (stop - 1 - old.guest_offset) // size

    # --- zeroes and discards ----------------------------------------------------------------------

    def zero(self, guest_offset: int, length: int) -> Plan:
        """Plan to make whole clusters read as zero, without host space.

        With extended L2, whole subclusters will do.

        Raises:
            WriteInstead: The entries cannot say it (version 2 over a backing file, a part of a
                compressed cluster): write zeroes.
            As `write`.
        """
        plan = Plan()
        for old, start, stop in self._clusters(guest_offset, length):
            if self._reads_as_zero(old) and not old.host_offset:
                continue
            keep = old.entry & (OFFSET_MASK | COPIED) if self._data_file else 0
            if self._extended:
                if stop - start < self._cluster_size:
                    self._zero_subclusters(plan, old, start, stop)
                    continue
                entry, bitmap = keep, ALLOCATED_BITS << ZERO_SHIFT
            elif self._version >= 3:
                entry, bitmap = keep | READS_AS_ZERO, 0
            elif self._has_backing:
                raise WriteInstead
            else:
                entry = bitmap = 0
            self._drop(plan, old)
            self._set(plan, old, entry, bitmap)
        return plan

    def _zero_subclusters(self, plan: Plan, old: _Old, start: int, stop: int) -> None:
        """Whole subclusters of a cluster. What is left of it keeps its place."""
        if old.entry & COMPRESSED:
            raise WriteInstead
        first, last = self._subclusters(old, start, stop)
        mask = (1 << last - first + 1) - 1 << first
        bitmap = old.bitmap & ~mask | mask << ZERO_SHIFT
        entry = old.entry
        if not bitmap & ALLOCATED_BITS and not self._data_file:
            self._drop(plan, old)
            entry = 0
        self._set(plan, old, entry, bitmap)

    def allocate_zeroes(self, guest_offset: int, length: int) -> Plan:
        """Plan to give whole clusters host space of their own while they read as zero.

        The caller reserves the space of `plan.pieces` (all zero) on the host. Version 2, which
        has no flag for it, and data files get zeroes as data.

        Raises:
            As `write`.
        """
        # Looked up first: once clusters are allocated, nothing may be missing.
        clusters = self._clusters(guest_offset, length)
        plan = self.write(guest_offset, length, Source.ZERO)
        if self._version < 3 or self._data_file:
            return plan
        plan.changes = []
        cursor = iter(
            cluster for first, count in plan.allocated for cluster in range(first, first + count)
        )
        for old, _, _ in clusters:
            host_offset = (
                old.host_offset if self._is_ours(old) else next(cursor) << self._cluster_bits
            )
            flag = 0 if self._extended else READS_AS_ZERO
            bitmap = ALLOCATED_BITS << ZERO_SHIFT if self._extended else 0
            self._set(plan, old, host_offset | COPIED | flag, bitmap)
        return plan

    def unmap(self, guest_offset: int, length: int) -> Plan:
        """Plan to let the layer below show through whole clusters.

        Raises:
            As `write`.
        """
        plan = Plan()
        for old, start, stop in self._clusters(guest_offset, length):
            if self._is_unallocated(old) and not old.entry:
                continue
            if stop - start < self._cluster_size:
                continue
            self._drop(plan, old)
            self._set(plan, old, 0)
        return plan

    def _clusters(self, guest_offset: int, length: int) -> list[tuple[_Old, int, int]]:
        """Each cluster of a range with the part of it that is in the range."""
        clusters = []
        position, end = guest_offset, guest_offset + length
        while position < end:
            old = self._old(position)
            stop = min(end, old.guest_offset + self._cluster_size)
            clusters.append((old, position, stop))
            position = stop
        return clusters

    # --- carrying out -----------------------------------------------------------------------------

    def commit(self, plan: Plan) -> None:
        """Enter the changes of a plan whose pieces are written.

        Raises:
            Missing: The slice is not in memory; nothing was changed.
        """
        l2 = self._l2
        table: array[int] | None = None
        for guest_offset, _, words in plan.changes:
            if table is None:
                table = l2.change_slice(guest_offset >> l2.slice_bits)
            index = (guest_offset >> self._cluster_bits & l2.slice_mask) * l2.entry_words
            table[index : index + len(words)] = words
        if plan.dropped:
            self._refcounts.dropped.update(plan.dropped)

    def give_up(self, plan: Plan) -> None:
        """Give back what a plan allocated that is not carried out."""
        self._refcounts.give_back(plan.allocated)


class WriteInstead(Exception):
    """Zeroes must be written: the entries cannot say it."""


def _with_allocated(bitmap: int, first: int, last: int) -> int:
    """The bitmap with subclusters `first` to `last` allocated and no longer zero."""
    mask = (1 << last - first + 1) - 1 << first
    return (bitmap | mask) & ~(mask << ZERO_SHIFT)
