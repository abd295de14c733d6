"""Writing to a qcow2 image: the order of events of one request.

1. Its guest range is locked, rounded to clusters, so that requests to one cluster follow each
   other.
2. The L2 table is made ours (allocated, or copied from a shared one).
3. A plan is made by plain functions (`planning.py`); it allocates host clusters.
4. What copy on write needs is read, and everything is written.
5. The mappings are entered by a plain function. If 4 failed or was cancelled, the host clusters
   are given back instead, and the guest still sees the old contents.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from ...errors import CorruptImageError
from ...mapping import EofMapping, IndirectMapping, RawMapping, SpecialMapping, ZeroMapping
from ...vectors import fill_views, split_views, total_length, zero_views
from ..base import DiscardTo
from .bitmaps import mark_bitmaps_in_use
from .entries import OFFSET_MASK
from .header import KNOWN_AUTOCLEAR
from .l2 import Missing
from .planning import Plan, Planner, Source, WriteInstead
from .refcounts import TableFull

if TYPE_CHECKING:
    from .driver import Qcow2

__all__ = ["Writer"]

_DIRTY_LIMIT = 8 << 20  # bytes of changed tables that wait for a flush
_TABLES_PER_TURN = 1 << 14
_LARGEST_COPY = 4 << 20  # bytes that are copied in one go to make a mapping writable


class Writer:
    """Changes one image. Its methods are those of the driver, which see."""

    def __init__(self, driver: Qcow2) -> None:
        self._driver = driver
        self._metadata = metadata = driver.metadata
        self._storage = metadata.storage
        self._data_storage = metadata.data_storage
        self._l2 = metadata.l2
        self._refcounts = metadata.refcounts
        self._planner = Planner(metadata, has_backing=driver.backing is not None)
        header = metadata.header
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._extended = header.extended_l2
        self._data_file = header.has_data_file
        self._raw_data_file = header.data_file_raw
        self._prepared = False
        self._preparing = trio.Lock()
        self._making_table = trio.Lock()

    def is_metadata(self, host_offset: int) -> bool:
        """Whether guest data must not be written at `host_offset` of the image file."""
        return not self._data_file and self._metadata.is_own(host_offset)

    def reach_changed(self, reach: int) -> None:
        """The driver's `reach` is another one now."""
        self._planner.set_reach(reach)

    # --- before the first change ----------------------------------------------------------------

    async def prepare(self) -> None:
        """See that the image may be changed, and that its header says so."""
        await self._begin()

    async def _begin(self) -> None:
        """What comes before every change; see that writing goes on, and that memory is bounded."""
        metadata = self._metadata
        metadata.check_alive()
        if not self._prepared:
            await self._prepare()
        if metadata.dirty_bytes() > _DIRTY_LIMIT:
            await metadata.flush(durable=False)

    async def _prepare(self) -> None:
        """Change the header as the first write demands, durably; once."""
        async with self._preparing:
            if self._prepared:
                return
            with trio.CancelScope(shield=True):
                await self._mark_changed()
            self._prepared = True
            self._driver.may_write_in_place(True)

    async def _mark_changed(self) -> None:
        """Durable before this returns, whatever is cancelled: nobody looks again."""
        metadata = self._metadata
        header = metadata.header
        if header.bitmaps is not None:
            await mark_bitmaps_in_use(metadata)
        if header.autoclear & ~KNOWN_AUTOCLEAR:
            # Whoever set them must learn that the image was written to.
            known = header.autoclear & KNOWN_AUTOCLEAR
            await metadata.change_header(replace(header, autoclear=known))

    # --- planning -------------------------------------------------------------------------------

    async def _plan(self, make: Callable[[], Plan]) -> Plan:
        """Make a plan, bringing in the tables that it needs."""
        held = []  # so that all that was loaded is there together, however small the cache is
        while True:
            try:
                return make()
            except Missing as missing:
                held.append(await missing.load())
            except TableFull:
                await self._metadata.grow_refcount_table()

    async def _make_table_ours(self, guest_offset: int) -> None:
        """See that the L2 table for `guest_offset` exists and belongs to the active state alone."""
        l2, refcounts = self._l2, self._refcounts
        if l2.is_table_ours(guest_offset):
            return
        async with self._making_table:
            if l2.is_table_ours(guest_offset):
                return
            old = l2.table_offset(guest_offset)

            def allocate() -> Plan:
                if old:
                    refcounts.check_reference(old >> self._cluster_bits, guest_offset)
                plan = Plan(allocated=refcounts.allocate(1))
                refcounts.take_virgin(plan.allocated[0][0], 1)
                return plan

            plan = await self._plan(allocate)
            cluster = plan.allocated[0][0]
            try:
                table = bytearray(self._cluster_size)
                if old:
                    # Changes to a shared table wait in no cache: it was never ours to change.
                    await self._storage.readv([memoryview(table)], old)
                await self._metadata.write(cluster << self._cluster_bits, memoryview(table))
            except BaseException:
                self._planner.give_up(plan)
                raise
            l2.set_table(guest_offset, cluster << self._cluster_bits)
            self._metadata.own.add(cluster)
            if old:
                self._metadata.own.discard(old >> self._cluster_bits)
                refcounts.dropped[old >> self._cluster_bits] += 1

    # --- writing --------------------------------------------------------------------------------

    async def writev(self, views: list[memoryview], guest_offset: int) -> None:
        """See `FormatDriver.writev`."""
        end = guest_offset + total_length(views)
        async with self._driver.locks.hold(*self._clusters(guest_offset, end)):
            while guest_offset < end:
                length = min(end, self._slice_end(guest_offset)) - guest_offset
                part, views = split_views(views, length)
                await self._begin()
                await self._make_table_ours(guest_offset)
                await self._write(part, guest_offset, length, Source.REQUEST)
                guest_offset += length

    def write_nowait(self, view: memoryview, guest_offset: int) -> bool:
        """Allocate and write at once, if nothing needs to be read and no table is missing.

        Returns:
            False: nothing was changed; give all of it to `writev`.
        """
        end = guest_offset + view.nbytes
        metadata, locks = self._metadata, self._driver.locks
        if (
            not self._prepared
            or metadata.lost is not None
            or end > self._slice_end(guest_offset)
            or (locks.entries and not locks.is_free(*self._clusters(guest_offset, end)))
            or not self._l2.is_table_ours(guest_offset)
            or metadata.dirty_bytes() > _DIRTY_LIMIT
        ):
            return False
        try:
            plan = self._planner.write(guest_offset, view.nbytes)
        except (Missing, TableFull, CorruptImageError):
            return False
        try:
            if self._write_pieces_nowait(plan, view, guest_offset):
                self._commit(plan)
                return True
        except Missing:
            pass
        self._planner.give_up(plan)
        return False

    def _write_pieces_nowait(self, plan: Plan, view: memoryview, guest_offset: int) -> bool:
        write = self._data_storage.writev_nowait
        if len(plan.pieces) == 1:
            piece = plan.pieces[0]
            if piece.source is Source.REQUEST:  # it is all of the request
                return write((view,), piece.host_offset) == piece.length
        for piece in plan.pieces:
            if piece.source is Source.OLD:
                return False
        for host_offset, buffers in self._writes(plan, [view], guest_offset, {}):
            if write(buffers, host_offset) != total_length(buffers):
                return False
        return True

    async def _write(
        self, views: list[memoryview], guest_offset: int, length: int, source: Source
    ) -> None:
        """Write within one L2 slice whose table is ours."""
        plan = await self._plan(lambda: self._planner.write(guest_offset, length, source))
        try:
            await self._write_pieces(plan, views, guest_offset)
            await self._commit_when_cached(plan)
        except BaseException:
            self._planner.give_up(plan)
            raise

    async def _write_pieces(self, plan: Plan, views: list[memoryview], guest_offset: int) -> None:
        old: dict[int, memoryview] = {}
        for piece in plan.pieces:
            if piece.source is Source.OLD:
                old[piece.guest_offset] = memoryview(bytearray(piece.length))
                await self.read_current([old[piece.guest_offset]], piece.guest_offset)
        for host_offset, buffers in self._writes(plan, views, guest_offset, old):
            length = total_length(buffers)
            if self._data_storage.writev_nowait(buffers, host_offset) != length:
                await self._data_storage.writev(buffers, host_offset)

    def _writes(
        self,
        plan: Plan,
        views: list[memoryview],
        guest_offset: int,
        old: dict[int, memoryview],
    ) -> list[tuple[int, list[memoryview]]]:
        """The vectored writes of a plan: (host offset, buffers), as few as there can be."""
        writes: list[tuple[int, list[memoryview]]] = []
        following = -1
        for piece in plan.pieces:
            if piece.source is Source.REQUEST:
                # Pieces of the request come in the order of their guest offsets, without gaps.
                buffers, views = split_views(views, piece.length)
            elif piece.source is Source.OLD:
                buffers = [old[piece.guest_offset]]
            else:
                buffers = zero_views(piece.length)
            if piece.host_offset == following:
                writes[-1][1].extend(buffers)
            else:
                writes.append((piece.host_offset, list(buffers)))
            following = piece.host_offset + piece.length
        return writes

    async def _commit_when_cached(self, plan: Plan) -> None:
        while True:
            try:
                self._commit(plan)
                return
            except Missing as missing:
                await missing.load()

    def _commit(self, plan: Plan) -> None:
        """Enter the mappings and tell who keeps copies of them. A plain function."""
        self._planner.commit(plan)
        if plan.changes:
            first, last = plan.changes[0].guest_offset, plan.changes[-1]
            end = last.guest_offset + last.clusters * self._cluster_size
            self._driver.mapping_changed(first, end - first)

    async def read_current(self, views: list[memoryview], guest_offset: int) -> None:
        """What the guest reads now; past the end of the disk or of a layer below: zeroes."""
        length = total_length(views)
        inside = min(length, self._driver.reach - guest_offset)
        if inside < length:
            views, tail = split_views(views, max(inside, 0))
            fill_views(tail)
            length = max(inside, 0)
        while length:
            mapping = await self._driver.get_mapping(guest_offset, length)
            part, views = split_views(views, mapping.length)
            match mapping:
                case RawMapping():
                    await mapping.storage.readv(part, mapping.offset)
                case SpecialMapping():
                    await self._driver.readv_special(part, guest_offset)
                case IndirectMapping():
                    layer = mapping.layer
                    covered = max(0, min(mapping.length, layer.size() - mapping.offset))
                    part, rest = split_views(part, covered)
                    fill_views(rest)
                    if covered:
                        await layer.readv(part, mapping.offset)
                case EofMapping():
                    fill_views(views)
                    return
                case _:
                    fill_views(part)
            guest_offset += mapping.length
            length -= mapping.length

    # --- zeroes and discards ----------------------------------------------------------------------

    async def write_zeroes(self, guest_offset: int, length: int, *, allocate: bool) -> None:
        """See `FormatDriver.write_zeroes`."""
        if allocate:
            await self._in_slices(guest_offset, length, self._allocate_zeroes, everywhere=True)
        else:
            await self._in_slices(guest_offset, length, self._zero)

    async def discard(self, guest_offset: int, length: int, to: DiscardTo) -> None:
        """See `FormatDriver.discard`."""
        change = {
            DiscardTo.ANY: self._discard_any,
            DiscardTo.ZERO: self._zero,
            DiscardTo.BACKING: self._unmap,
        }[to]
        await self._in_slices(guest_offset, length, change)

    async def map_zeroes(
        self, guest_offset: int, length: int, reserve: Callable[[int, int], Awaitable[None]]
    ) -> None:
        """Map a range to data that reads as zero.

        Args:
            guest_offset: Where it begins, in bytes.
            length: Its length in bytes.
            reserve: Makes a range of the storage with the data (host offset, length) read as zero.
        """

        async def change(start: int, stop: int) -> None:
            plan = await self._plan(lambda: self._planner.write(start, stop - start, Source.ZERO))
            try:
                for piece in plan.pieces:
                    await reserve(piece.host_offset, piece.length)
                await self._commit_when_cached(plan)
            except BaseException:
                self._planner.give_up(plan)
                raise

        await self._in_slices(guest_offset, length, change, everywhere=True)

    async def _in_slices(
        self,
        guest_offset: int,
        length: int,
        change: Callable[[int, int], Awaitable[None]],
        *,
        everywhere: bool = False,
    ) -> None:
        """Carry out a change slice by slice, each under its own lock.

        Unless `everywhere`, what has no L2 table and nothing below is left as it is. A raw data
        file may have more than that: what a write left there that was never mapped.
        """
        end = guest_offset + length
        everywhere = everywhere or self._raw_data_file
        while guest_offset < end:
            await trio.lowlevel.checkpoint_if_cancelled()
            untouched_end = guest_offset if everywhere else self._untouched_end(guest_offset, end)
            if untouched_end > guest_offset:
                guest_offset = untouched_end
                await trio.lowlevel.checkpoint()
                continue
            stop = min(end, self._slice_end(guest_offset))
            async with self._driver.locks.hold(*self._clusters(guest_offset, stop)):
                await self._begin()
                await self._make_table_ours(guest_offset)
                await change(guest_offset, stop)
            guest_offset = stop

    def _untouched_end(self, guest_offset: int, end: int) -> int:
        """Up to where there is no L2 table and nothing below: it reads as zero, takes no space.

        A disk may have millions of tables: a turn for other tasks comes after some thousand.
        """
        l2, backing = self._l2, self._driver.backing
        first = guest_offset >> l2.l1_bits
        if backing is not None and first << l2.l1_bits < backing.size():
            return guest_offset
        index, last = first, min((end - 1 >> l2.l1_bits) + 1, first + _TABLES_PER_TURN)
        while index < last and not l2.l1[index] & OFFSET_MASK:
            index += 1
        return max(guest_offset, index << l2.l1_bits)

    async def _zero(self, start: int, stop: int) -> None:
        """Make a range within one slice read as zero."""
        first, last = self._inner(start, stop)
        if first >= last:
            await self._write_zero_data(start, stop)
            return
        await self._write_zero_data(start, first)
        try:
            await self._punch_data_file(first, last)
            await self._change_entries(lambda: self._planner.zero(first, last - first))
        except WriteInstead:
            await self._write_zero_data(first, min(last, stop))
        await self._write_zero_data(last, stop)

    async def _discard_any(self, start: int, stop: int) -> None:
        """Return the space of whole units; what stays readable reads as before or as zero."""
        first, last = self._inner(start, stop)
        if first >= last:
            return
        try:
            await self._punch_data_file(first, last)
            await self._change_entries(lambda: self._planner.zero(first, last - first))
        except WriteInstead:
            return

    async def _unmap(self, start: int, stop: int) -> None:
        """Let the layer below show through whole clusters."""
        first, last = self._whole_clusters(start, stop)
        if first >= last:
            return
        if self._raw_data_file:
            # No further than it is long: what is cut off may reach far behind the disk's end.
            await self._punch_data_file(first, min(last, self._data_storage.size()))
        await self._change_entries(lambda: self._planner.unmap(first, last - first))
        if self._data_file:
            # Punched before the entries are durable, a power cut would show zeroes as the guest's;
            # and so would a read that looked them up before.
            await self._metadata.flush(durable=True)
            await self._metadata.epochs.wait_for_earlier()
            length = min(last, self._driver.reach) - first
            await self._data_storage.discard(first, length)

    async def _allocate_zeroes(self, start: int, stop: int) -> None:
        """Make a range within one slice read as zero, with host space of its own."""
        first, last = self._whole_clusters(start, stop)
        if first >= last:
            await self._write([], start, stop - start, Source.ZERO)
            return
        if start < first:
            await self._write([], start, first - start, Source.ZERO)
        plan = await self._plan(lambda: self._planner.allocate_zeroes(first, last - first))
        try:
            for piece in plan.pieces:
                await self._data_storage.write_allocated_zeroes(piece.host_offset, piece.length)
            await self._commit_when_cached(plan)
        except BaseException:
            self._planner.give_up(plan)
            raise
        if last < stop:
            await self._write([], last, stop - last, Source.ZERO)

    async def _write_zero_data(self, start: int, stop: int) -> None:
        """Write zeroes cluster by cluster, but where nothing but zeroes is."""
        while start < stop:
            end = min(stop, (start | self._cluster_size - 1) + 1)
            mapping = await self._driver.get_mapping(start, end - start)
            covered = start + mapping.length
            if not isinstance(mapping, ZeroMapping):
                await self._write([], start, mapping.length, Source.ZERO)
            elif self._raw_data_file:
                # A write that failed before it was mapped may have left something there.
                await self._punch_data_file(start, covered)
            start = covered

    async def _change_entries(self, make: Callable[[], Plan]) -> None:
        """Carry out a plan that only changes entries."""
        plan = await self._plan(make)
        await self._commit_when_cached(plan)

    async def _punch_data_file(self, start: int, stop: int) -> None:
        """The data file changes first: read by itself it may be the guest's disk."""
        if self._data_file:
            length = min(stop, self._driver.reach) - start
            if length > 0:
                await self._data_storage.write_zeroes(start, length)

    # --- mappings to write through ----------------------------------------------------------------

    async def ensure_data_mapping(
        self, guest_offset: int, length: int, *, overwrite: bool
    ) -> RawMapping:
        """See `FormatDriver.ensure_data_mapping`."""
        stop = min(guest_offset + min(length, _LARGEST_COPY), self._slice_end(guest_offset))
        source = Source.ZERO if overwrite else Source.OLD
        async with self._driver.locks.hold(*self._clusters(guest_offset, stop)):
            await self._begin()
            await self._make_table_ours(guest_offset)
            mapping = await self._driver.get_mapping(guest_offset, stop - guest_offset)
            if not (isinstance(mapping, RawMapping) and mapping.writable):
                # What is not ours yet becomes ours with contents that nobody else wrote. Zeroes
                # only go where the mapping is sure to reach: the new clusters may lie apart.
                length = mapping.length
                if overwrite:
                    length = min(length, self._cluster_size - guest_offset % self._cluster_size)
                await self._write([], guest_offset, length, source)
                mapping = await self._driver.get_mapping(guest_offset, length)
        assert isinstance(mapping, RawMapping)
        return mapping

    # --- ranges ---------------------------------------------------------------------------------

    def _clusters(self, start: int, stop: int) -> tuple[int, int]:
        """A range, rounded out to whole clusters."""
        size = self._cluster_size
        return start // size * size, -(-stop // size) * size

    def _inner(self, start: int, stop: int) -> tuple[int, int]:
        """The part of a range that entries can call zero: whole granules."""
        return self._whole(start, stop, self._driver.granularity)

    def _whole_clusters(self, start: int, stop: int) -> tuple[int, int]:
        """The whole clusters in a range."""
        return self._whole(start, stop, self._cluster_size)

    def _whole(self, start: int, stop: int, unit: int) -> tuple[int, int]:
        # The last unit of the disk is whole if the range reaches the disk's end.
        last = -(-stop // unit) if stop == self._driver.reach else stop // unit
        return -(-start // unit) * unit, last * unit

    def _slice_end(self, guest_offset: int) -> int:
        bits = self._l2.slice_bits
        return (guest_offset >> bits) + 1 << bits
