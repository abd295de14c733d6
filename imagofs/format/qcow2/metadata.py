"""The metadata cache of a qcow2 image, and the order in which it reaches the disk.

The crash rule lives here: whatever subset of the unsynced writes a power cut leaves, the image
has leaked clusters at most, and what a sync covered is there. A flush begins with a *cut*, a copy
of everything that is dirty at that moment, taken by a plain function. What changes while the cut
is being written belongs to the next flush. Then, in this order:

    1. refcount blocks (increments); a block that the refcount table does not know yet is made
       durable before its table entry is written
    2. sync: guest data and refcounts are durable
    3. L2 slices and L1 entries, in any order: a new table was written as a whole when it was made,
       so by 2 it is durable as it was then, and that is as right as what is in it now
    4. sync: if the caller asked for durability, or references were dropped
    5. host clusters without references are punched once all I/O on them has ended, and their
       counts taken off: only now may they be used again
    6. the blocks with those decrements (not synced: if they are lost, clusters leak)

A step that fails or is cancelled puts the whole cut back among what is dirty. A sync that fails
ends writing for good: the kernel may have dropped the pages that it could not write.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import trio

from ...caching import MetadataCache
from ...errors import ImagofsError, OutOfRangeError, SyncLostError
from ...storage.base import Storage
from .entries import to_big_endian
from .epochs import IoEpochs
from .header import FIELDS_OFFSET, MAX_REFTABLE_BYTES, Header
from .l2 import L2Tables, with_tables
from .own import OwnClusters
from .refcounts import Refcounts

__all__ = ["Metadata", "stretches"]

_SECTOR = 512
_ENTRIES_PER_SECTOR = _SECTOR // 8


@dataclass(slots=True)
class _Cut:
    """What one flush writes. Places are host offsets."""

    blocks: list[tuple[int, bytes]]
    new_blocks: list[tuple[int, bytes]]
    reftable: list[tuple[int, bytes]]
    slices: list[tuple[int, bytearray]]
    l1: list[tuple[int, bytes]]
    # What is put back if the flush does not end.
    dirty_sectors: dict[int, set[int]]
    new_block_indexes: set[int]
    dirty_l1: set[int]
    dropped: Counter[int]

    def is_empty(self) -> bool:
        return not (self.blocks or self.new_blocks or self.slices or self.l1 or self.dropped)


class Metadata:
    """Tables, refcounts and header of one image that is open.

    Args:
        storage: The image file.
        data_storage: Where guest data is: the same, or the external data file.
        header: The header.
        l1: The L1 table's entries.
        reftable: The refcount table's entries.
        cache: Where clean tables are kept.
    """

    def __init__(
        self,
        storage: Storage,
        data_storage: Storage,
        header: Header,
        l1: array[int],
        reftable: array[int],
        cache: MetadataCache,
    ) -> None:
        self.storage = storage
        self.data_storage = data_storage
        self.header = header
        self.l2 = L2Tables(storage, header, l1, cache)
        #: Host clusters that hold metadata: guest data there is never written. Not filled where the
        #: image is only read.
        self.own = OwnClusters()
        self.refcounts = Refcounts(storage, header, reftable, cache, self.own)
        self.epochs = IoEpochs()
        self._flushing = trio.Lock()
        self._asked = self._covered = self._covered_durably = 0
        #: Why nothing is written any more: a sync failed.
        self.lost: str | None = None
        #: Called then, a plain function.
        self.on_lost: Callable[[], None] | None = None

    def is_own(self, host_offset: int) -> bool:
        """Whether the host cluster at `host_offset` holds metadata."""
        return host_offset >> self.header.cluster_bits in self.own

    # --- the cut ------------------------------------------------------------------------------

    def dirty_bytes(self) -> int:
        """Bytes of changed tables that wait for a flush."""
        return (
            len(self.l2.dirty) * self.l2.slice_bytes
            + len(self.refcounts.blocks) * self.header.cluster_size
            + len(self.refcounts.dropped) * 64
        )

    def _take_cut(self) -> _Cut:
        """Copy everything dirty and call it clean. A plain function."""
        l2, refcounts, header = self.l2, self.refcounts, self.header
        blocks: list[tuple[int, bytes]] = []
        new_blocks: list[tuple[int, bytes]] = []
        for index, sectors in refcounts.dirty_sectors.items():
            target = new_blocks if index in refcounts.new_blocks else blocks
            for first, number in stretches(sectors):
                place = refcounts.table[index] + first * _SECTOR
                target.append((place, refcounts.sector_bytes(index, first, number)))
        cut = _Cut(
            blocks=blocks,
            new_blocks=new_blocks,
            reftable=_table_sectors(refcounts.table, refcounts.new_blocks, header.reftable_offset),
            slices=l2.encoded(),
            l1=_table_sectors(l2.l1, l2.dirty_l1, header.l1_offset),
            dirty_sectors=refcounts.dirty_sectors,
            new_block_indexes=refcounts.new_blocks,
            dirty_l1=l2.dirty_l1,
            dropped=refcounts.dropped,
        )
        refcounts.writing, refcounts.blocks = refcounts.blocks, {}
        l2.writing, l2.dirty = l2.dirty, {}
        refcounts.dirty_sectors, refcounts.new_blocks = {}, set()
        l2.dirty_l1 = set()
        refcounts.dropped = Counter()
        return cut

    def _put_back(self, cut: _Cut) -> None:
        """Make a cut dirty again whose flush did not end. A plain function."""
        l2, refcounts = self.l2, self.refcounts
        refcounts.blocks = refcounts.writing | refcounts.blocks
        l2.dirty = l2.writing | l2.dirty
        for index, sectors in cut.dirty_sectors.items():
            refcounts.dirty_sectors.setdefault(index, set()).update(sectors)
        refcounts.new_blocks |= cut.new_block_indexes
        l2.dirty_l1 |= cut.dirty_l1
        refcounts.dropped.update(cut.dropped)
        refcounts.writing, l2.writing = {}, {}

    # --- flushing -----------------------------------------------------------------------------

    def check_alive(self) -> None:
        """See that no sync has failed.

        Raises:
            SyncLostError: One has.
        """
        if self.lost is not None:
            raise SyncLostError(self.lost, filename=self.storage.filename)

    async def flush(self, *, durable: bool) -> None:
        """Write everything that is dirty now, in the order that the module's text gives.

        Several callers that wait share the next flush; none joins one that began before it asked.

        Args:
            durable: Also sync, even if there is nothing to write.

        Raises:
            StorageError: A write failed. Nothing is forgotten: a later flush tries again.
            SyncLostError: A sync failed, now or earlier.
        """
        self._asked += 1
        ticket = self._asked
        async with self._flushing:
            self.check_alive()
            if (self._covered_durably if durable else self._covered) >= ticket:
                return
            covers = self._asked
            await self._flush(durable=durable)
            self._covered = covers
            if durable:
                self._covered_durably = covers

    async def _flush(self, *, durable: bool) -> None:
        cut = self._take_cut()
        try:
            if not cut.is_empty():
                await self._write_cut(cut, durable=durable)
            elif durable:
                await self._sync()
        except BaseException:
            self._put_back(cut)
            raise
        self._forget_writing()

    def _forget_writing(self) -> None:
        """The tables that were written are clean. Whoever loads one began before: loads again."""
        self.refcounts.writing, self.l2.writing = {}, {}
        self.refcounts.flushes += 1
        self.l2.flushes += 1

    async def _write_cut(self, cut: _Cut, *, durable: bool) -> None:
        if cut.new_blocks:
            # Each counts itself, so it needs nothing before it; its table entry needs it.
            await self._write_all(cut.new_blocks)
            await self._sync()
            await self._write_all(cut.reftable)
        await self._write_all(cut.blocks)
        again = durable or bool(cut.dropped)
        if cut.slices or cut.l1:
            await self._sync_around([*cut.slices, *cut.l1], again=again)
        elif again:
            await self._sync()
        if cut.dropped:
            await self._free(cut.dropped)

    async def _free(self, dropped: Counter[int]) -> None:
        """Return what has no references any more. The dereferences are durable.

        Block by block, so that no more than one needs to be in memory; what is done is removed
        from `dropped`.
        """
        refcounts, bits = self.refcounts, self.header.cluster_bits
        await self.epochs.wait_for_earlier()
        by_block: dict[int, Counter[int]] = {}
        for cluster, times in dropped.items():
            by_block.setdefault(cluster >> refcounts.block_bits, Counter())[cluster] = times
        for group in by_block.values():
            last = await with_tables(partial(refcounts.last_references, group))
            for first, number in stretches(last):
                await self.storage.discard(first << bits, number << bits)
            # While the holes were punched, the block may have been forgotten.
            await with_tables(partial(refcounts.take_off, group))
            for cluster in group:
                del dropped[cluster]
        await self._write_decrements()

    async def _write_decrements(self) -> None:
        """Write the known blocks that changed, those that others changed meanwhile included."""
        refcounts = self.refcounts
        written: dict[int, set[int]] = {}
        changes: list[tuple[int, bytes]] = []
        for index in refcounts.dirty_sectors.keys() - refcounts.new_blocks:
            sectors = written[index] = refcounts.dirty_sectors.pop(index)
            for first, number in stretches(sectors):
                place = refcounts.table[index] + first * _SECTOR
                changes.append((place, refcounts.sector_bytes(index, first, number)))
        try:
            await self._write_all(changes)
        except BaseException:
            for index, sectors in written.items():
                refcounts.dirty_sectors.setdefault(index, set()).update(sectors)
            raise
        for index in written:
            if index not in refcounts.dirty_sectors:
                refcounts.blocks.pop(index, None)

    async def _write_all(self, changes: Iterable[tuple[int, bytes | bytearray]]) -> None:
        for place, data in changes:
            await self.write(place, data)

    async def write(self, host_offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write metadata to the image file."""
        view = memoryview(data)
        if self.storage.writev_nowait((view,), host_offset) != view.nbytes:
            await self.storage.writev([view], host_offset)

    async def _sync(self) -> None:
        """Make all that was written durable, guest data first."""
        try:
            if self.data_storage is not self.storage:
                await self.data_storage.sync()
            await self.storage.sync()
        except ImagofsError as exc:
            self._lose_sync(exc)

    async def _sync_around(
        self, writes: Sequence[tuple[int, bytes | bytearray]], *, again: bool
    ) -> None:
        """Write once all that was written before is durable; make durable this too if `again`."""
        try:
            if self.data_storage is not self.storage:
                await self.data_storage.sync()
        except ImagofsError as exc:
            self._lose_sync(exc)
        try:
            await self.storage.sync_around(writes, again=again)
        except SyncLostError as exc:
            self._lose_sync(exc)

    def _lose_sync(self, error: ImagofsError) -> NoReturn:
        self._lose(f"a sync failed ({error.message}); what was written since may be lost")

    def _lose(self, reason: str) -> NoReturn:
        """End all writing.

        Raises:
            SyncLostError: Always.
        """
        self.lost = f"{reason}; nothing more is written until the image is opened anew"
        if self.on_lost is not None:
            self.on_lost()
        raise SyncLostError(self.lost, filename=self.storage.filename)

    @asynccontextmanager
    async def settled(self) -> AsyncIterator[None]:
        """Make everything durable, and let nobody else flush while the block runs.

        Tables may go on changing in memory. Only in such a block the header is changed.

        Raises:
            As `flush`.
        """
        async with self._flushing:
            self.check_alive()
            await self._flush(durable=True)
            yield

    async def sync_now(self) -> None:
        """Make durable what was written by `write`, outside of a flush.

        Raises:
            SyncLostError: It failed.
        """
        await self._sync()

    async def overwrite(self, host_offset: int, new: bytes, old: bytes) -> None:
        """Write `new` in the place of `old`, durable before this returns. It cannot be cancelled.

        Raises:
            StorageError: The write failed; `old` was put back.
            SyncLostError: It could not be put back, or a sync failed.
        """
        self.check_alive()
        with trio.CancelScope(shield=True):
            try:
                await self.write(host_offset, new)
            except ImagofsError:
                try:
                    await self.write(host_offset, old)
                except ImagofsError as exc:
                    self._lose(f"a table could neither be changed nor put back ({exc.message})")
                await self._sync()
                raise
            await self._sync()

    # --- the header ---------------------------------------------------------------------------

    async def change_header(self, header: Header) -> None:
        """Put the fields of `header` in the place of the old ones, durable before this returns.

        The fields lie in one sector: a power cut leaves the old ones or the new ones. Extensions
        and names stay as they are.
        """
        self.check_alive()
        await self._sync()
        await self._write_header(header)
        await self._sync()

    async def _write_header(self, header: Header) -> None:
        """Write the fields; nobody can cancel it between that and `self.header`.

        A write that fails may have reached the file all the same. So the old fields are put back,
        durably, before what the new ones refer to is used for something else.

        Raises:
            StorageError: The write failed; the old fields hold.
            SyncLostError: They could not be put back.
        """
        with trio.CancelScope(shield=True):
            try:
                await self.write(FIELDS_OFFSET, header.encode_fields())
            except ImagofsError:
                try:
                    await self.write(FIELDS_OFFSET, self.header.encode_fields())
                except ImagofsError as exc:
                    self._lose(f"the header could neither be changed nor put back ({exc.message})")
                await self._sync()
                raise
            self.header = header

    # --- growing the refcount table -------------------------------------------------------------

    async def grow_refcount_table(self) -> None:
        """Make room for more refcount blocks, unless somebody else just did.

        The new table and the blocks that count it lie behind everything that the old one can
        count. They are durable before the header's fields switch to them, in one write.

        Raises:
            OutOfRangeError: The table would be larger than any program reads.
        """
        entries = len(self.refcounts.table)
        async with self._flushing:
            if len(self.refcounts.table) != entries:
                return
            self.check_alive()
            self.refcounts.growing = True
            try:
                await self._flush(durable=True)
                await self._move_refcount_table()
            finally:
                self.refcounts.growing = False

    async def _move_refcount_table(self) -> None:
        refcounts, header = self.refcounts, self.header
        cluster_size, bits = header.cluster_size, header.cluster_bits
        old_entries = len(refcounts.table)
        first = old_entries << refcounts.block_bits
        table_clusters = max(header.reftable_clusters * 3 // 2, header.reftable_clusters + 1)
        limit = max(MAX_REFTABLE_BYTES >> bits, 1)
        table_clusters = min(table_clusters, limit)
        if table_clusters <= header.reftable_clusters:
            raise OutOfRangeError(
                f"the refcount table cannot grow beyond {limit << bits} bytes: the image file has "
                f"the largest size that it can have with clusters of {cluster_size} bytes",
                filename=self.storage.filename,
            )
        blocks = 1
        while table_clusters + blocks > blocks << refcounts.block_bits:
            blocks += 1
        # The blocks come first, the table behind them.
        used = blocks + table_clusters
        table = refcounts.table + array("Q", bytes((table_clusters << bits) - old_entries * 8))
        new_blocks = {}
        for number in range(blocks):
            table[old_entries + number] = first + number << bits
            new_blocks[old_entries + number] = refcounts.full_block(
                used - (number << refcounts.block_bits)
            )
        if self.own.reach(first):
            raise refcounts.uncounted_metadata()
        for index, block in new_blocks.items():
            await self.write(table[index], refcounts.encoded_block(block))
        await self.write(first + blocks << bits, to_big_endian(table))
        await self._sync()
        old_first, old_clusters = header.reftable_offset >> bits, header.reftable_clusters
        await self._write_header(
            replace(
                header, reftable_offset=first + blocks << bits, reftable_clusters=table_clusters
            )
        )
        # No await: from here on the file is read through the new table.
        refcounts.use_table(table, new_blocks, first + used)
        self.own.remove_range(range(old_first, old_first + old_clusters))
        self.own.add_range(range(first, first + blocks))
        self.own.add_range(range(first + blocks, first + used))
        # The next flush syncs before it frees anything.
        refcounts.dropped.update(range(old_first, old_first + old_clusters))


def stretches(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """(first, count) of each stretch of consecutive numbers, in order."""
    stretches: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if stretches and sum(stretches[-1]) == number:
            first, count = stretches[-1]
            stretches[-1] = (first, count + 1)
        else:
            stretches.append((number, 1))
    return stretches


def _table_sectors(
    table: array[int], indexes: Iterable[int], table_offset: int
) -> list[tuple[int, bytes]]:
    """The sectors of a table that hold the changed entries, as (host offset, bytes)."""
    sectors = {index // _ENTRIES_PER_SECTOR for index in indexes}
    changes: list[tuple[int, bytes]] = []
    for first, count in stretches(sectors):
        entries = table[first * _ENTRIES_PER_SECTOR : (first + count) * _ENTRIES_PER_SECTOR]
        changes.append((table_offset + first * _SECTOR, to_big_endian(entries)))
    return changes
