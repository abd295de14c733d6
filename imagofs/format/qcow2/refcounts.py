"""Refcounts and the allocation of host clusters.

The refcount table is resident. Blocks are loaded as they are needed; changed ones are held here
until a flush has written them. In memory a count has every increment that was made, and only
those decrements whose dereference is durable: what was dereferenced and is not durable yet waits
in `dropped`, and is neither reused nor punched.

Everything here is a plain function but loading: a function that needs a block that is not in
memory changes nothing and raises `Missing`.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple
from weakref import WeakValueDictionary

from ...caching import MetadataCache
from ...errors import CorruptImageError
from ...storage.base import Storage
from .entries import (
    REFTABLE_RESERVED,
    pack_refcounts,
    unpack_refcounts,
)
from .header import Header
from .l2 import Missing
from .own import OwnClusters

__all__ = ["HostRun", "Refcounts", "TableFull"]

_SECTOR = 512
_MAX_FREE_RUNS = 1 << 14  # kept in memory; where there are more, they are found by looking again

#: (first host cluster, number of clusters)
HostRun = tuple[int, int]


class TableFull(Exception):
    """The refcount table has no entry for the next block: grow it, then allocate again."""


class _Found(NamedTuple):
    """Free clusters, before they are taken.

    Attributes:
        runs: The clusters.
        cursor: Behind the last one that was found by looking.
        used_free: So many of the runs that were seen freed are used up.
        rest: What is left of the last of them.
        held: The blocks, so that the cache does not forget them before the clusters are taken.
    """

    runs: list[HostRun]
    cursor: int
    used_free: int
    rest: HostRun | None
    held: list[array[int] | None]


class Refcounts:
    """The refcounts of one image.

    Args:
        storage: The image file.
        header: Its header.
        table: The refcount table's entries.
        cache: Where clean blocks are kept.
        own: Host clusters that hold metadata; blocks made here are entered.
    """

    def __init__(
        self,
        storage: Storage,
        header: Header,
        table: array[int],
        cache: MetadataCache,
        own: OwnClusters,
    ) -> None:
        self._storage = storage
        self._own = own
        self._bits = header.refcount_bits
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self.table = table
        #: log2 of the clusters that a block counts.
        self.block_bits = header.cluster_bits + 3 - header.refcount_order
        self._block_entries = 1 << self.block_bits
        self._cache = cache
        self._namespace = cache.namespace()
        #: Changed blocks by index; they are found here although the cache may forget them.
        self.blocks: dict[int, array[int]] = {}
        #: Blocks that a flush is writing; they are found here too.
        self.writing: dict[int, array[int]] = {}
        #: Blocks that anybody still holds: who needs several at a time gets them all, however small
        #: the cache is.
        self._alive: WeakValueDictionary[int, array[int]] = WeakValueDictionary()
        #: How often changed blocks were written. What was read from the file before is stale.
        self.flushes = 0
        #: Per changed block, the sectors of it that changed.
        self.dirty_sectors: dict[int, set[int]] = {}
        #: Blocks that the table on disk does not know yet.
        self.new_blocks: set[int] = set()
        #: References per host cluster that were taken away, not durable yet.
        self.dropped: Counter[int] = Counter()
        #: Free runs that were seen freed; looked at before anything else.
        self._free: list[HostRun] = []
        #: Below it no cluster is free, but for those in `_free`.
        self._cursor = 0
        end = storage.size()
        #: Host clusters from here on were never used: what lies there reads as zero.
        self._virgin = end + header.cluster_size - 1 >> header.cluster_bits
        #: No cluster is allocated while the refcount table grows.
        self.growing = False
        #: Clusters that were allocated since the image was opened.
        self.allocated = 0

    # --- blocks ---------------------------------------------------------------------------------

    def _block_nowait(self, index: int) -> array[int] | None:
        return (
            self.blocks.get(index)
            or self._cache.get(self._namespace + index)
            or self.writing.get(index)
            or self._alive.get(index)
        )

    def _need_block(self, index: int) -> array[int] | None:
        """The block, None where the table has none (all its counts are 0).

        Raises:
            Missing: It is not in memory.
        """
        block = self._block_nowait(index)
        if block is None and index < len(self.table) and self.table[index]:
            raise Missing(lambda: self._load(index))
        return block

    async def _load(self, index: int) -> array[int]:
        offset = self.table[index]
        if (
            offset & REFTABLE_RESERVED
            or offset & self._cluster_size - 1
            or (offset + self._cluster_size > self._storage.size())
        ):
            raise CorruptImageError(
                f"refcount table entry {index} points to {offset:#x}, where no block can be; run "
                f"imagofs check",
                filename=self._storage.filename,
            )
        while (block := self._block_nowait(index)) is None:
            flushes = self.flushes
            data = await self._storage.read_table(self._cluster_size, offset)
            if self._block_nowait(index) is None and self.flushes == flushes:
                block = self._alive[index] = unpack_refcounts(data, self._bits)
                self._cache.put(self._namespace + index, block)
                break
        return block

    def _change(self, cluster: int, count: int) -> None:
        """Set one count. The block is in memory (`_need_block` was called for it)."""
        index = cluster >> self.block_bits
        block = self._block_nowait(index)
        assert block is not None
        self.blocks[index] = block
        within = cluster & self._block_entries - 1
        block[within] = count
        self.dirty_sectors.setdefault(index, set()).add(within * self._bits // 8 // _SECTOR)

    def _change_run(self, first: int, number: int, count: int) -> None:
        """Set the counts of a run within one block."""
        index = first >> self.block_bits
        block = self._block_nowait(index)
        assert block is not None
        self.blocks[index] = block
        within = first & self._block_entries - 1
        block[within : within + number] = array(block.typecode, [count]) * number
        sectors = self.dirty_sectors.get(index)
        if sectors is None:
            sectors = self.dirty_sectors[index] = set()
        first_sector = within * self._bits // 8 // _SECTOR
        last_sector = (within + number - 1) * self._bits // 8 // _SECTOR
        sectors.add(first_sector)
        if last_sector > first_sector:
            sectors.update(range(first_sector + 1, last_sector + 1))

    def get(self, cluster: int) -> int:
        """The count of a host cluster as it is in memory.

        Raises:
            Missing: The block is not in memory.
        """
        block = self._need_block(cluster >> self.block_bits)
        return 0 if block is None else block[cluster & self._block_entries - 1]

    def tail(self) -> tuple[list[int], int]:
        """What could be cut off behind the last host cluster that is used.

        Returns:
            Indexes of the last blocks, those that count nothing, or nothing but themselves; and
            the number of the first cluster behind all that the others count.

        Raises:
            Missing: A block is not in memory.
        """
        idle: list[int] = []
        for index in reversed(range(len(self.table))):
            block = self._need_block(index)
            if block is None:
                continue
            counts = block[:]
            own = (self.table[index] >> self._cluster_bits) - (index << self.block_bits)
            if 0 <= own < self._block_entries:
                counts[own] = 0
            if any(counts):
                used = len(block.tobytes().rstrip(b"\0"))
                return idle, (index << self.block_bits) + -(-used // block.itemsize)
            idle.append(index)
        return idle, 0

    def forget_blocks(self, indexes: Iterable[int]) -> None:
        """Go on without blocks that `tail` named and that the table on disk has no more."""
        for index in indexes:
            cluster = self.table[index] >> self._cluster_bits
            self.table[index] = 0
            for blocks in (self.blocks, self.writing):
                blocks.pop(index, None)
            self._cache.drop(self._namespace + index)
            self._alive.pop(index, None)
            self.dirty_sectors.pop(index, None)
            self._own.discard(cluster)
            if cluster >> self.block_bits != index:
                self.dropped[cluster] += 1
            # What they counted is free, but in a range that has no block any more.
            first = index << self.block_bits
            self._cursor = min(self._cursor, first)
            self._free = [run for run in self._free if run[0] < first]

    def encoded_block(self, block: array[int]) -> bytes:
        """A whole block as the file has it."""
        return pack_refcounts(block, self._bits)

    def full_block(self, used: int) -> array[int]:
        """A new block whose first `used` counts (at most all) are 1, the others 0."""
        block = unpack_refcounts(bytes(self._cluster_size), self._bits)
        used = max(0, min(used, self._block_entries))
        block[:used] = array(block.typecode, [1]) * used
        return block

    def use_table(self, table: array[int], blocks: dict[int, array[int]], used_up_to: int) -> None:
        """Go on with a larger table whose new blocks are on disk already."""
        self.table = table
        for index, block in blocks.items():
            self._alive[index] = block
            self._cache.put(self._namespace + index, block)
        self._virgin = max(self._virgin, used_up_to)

    def add_blocks(self, blocks: dict[int, array[int]], first: int, used_up_to: int) -> None:
        """Enter new blocks that lie behind each other and that the caller writes.

        Args:
            blocks: The blocks by their indexes, which are consecutive.
            first: The number of the first one's cluster.
            used_up_to: The number of the cluster behind those that they count.
        """
        for number, (index, block) in enumerate(blocks.items()):
            self.table[index] = first + number << self._cluster_bits
            # Held here until the next flush: what is not on disk yet must not be forgotten.
            self.blocks[index] = self._alive[index] = block
        self._virgin = max(self._virgin, used_up_to)
        self.allocated += used_up_to - first

    def are_not_written(self, blocks: Iterable[int]) -> None:
        """Leave blocks of `add_blocks` to the next flush: writing them failed."""
        for index in blocks:
            self.new_blocks.add(index)
            self.dirty_sectors[index] = set(range(self._cluster_size // _SECTOR))

    def sector_bytes(self, index: int, first: int, number: int) -> bytes:
        """`number` sectors of a changed block as the file has them."""
        per_sector = _SECTOR * 8 // self._bits
        block = self.blocks[index]
        return pack_refcounts(block[first * per_sector : (first + number) * per_sector], self._bits)

    # --- allocating -----------------------------------------------------------------------------

    def allocate(self, number: int) -> list[HostRun]:
        """Take `number` host clusters, in as few runs as there are; each gets the count 1.

        Raises:
            Missing: A block is not in memory; nothing was changed.
            TableFull: The refcount table must grow first, or does so; nothing was changed.
            CorruptImageError: A cluster with metadata is not counted.
        """
        if self.growing:
            raise TableFull
        found = self._find(number)
        for run in found.runs:
            if self._is_over_metadata(run):
                raise self.uncounted_metadata()
        # From here on nothing may raise.
        self._free[: found.used_free] = [] if found.rest is None else [found.rest]
        self._cursor = max(self._cursor, found.cursor)
        for first, count in found.runs:
            self._take(first, count)
        self.allocated += number
        return found.runs

    def _is_over_metadata(self, run: HostRun) -> bool:
        """Whether clusters with metadata would be taken: the run's, or the one of a new block."""
        first, count = run
        index = first >> self.block_bits
        if not self.table[index] and index << self.block_bits in self._own:
            return True
        return self._own.overlaps(range(first, first + count))

    def allocate_run(self, number: int) -> HostRun | None:
        """Take `number` host clusters behind each other; each gets the count 1.

        Returns:
            The run; None where no one block counts as many.

        Raises:
            As `allocate`.
        """
        if self.growing:
            raise TableFull
        if number >= self._block_entries:
            return None
        start = self._cursor
        while True:
            first, count = self._free_run(start, number)
            if count == number:
                break
            start = first + count
        if self._is_over_metadata((first, number)):
            raise self.uncounted_metadata()
        self._take(first, number)
        self.take_virgin(first, number)
        self.allocated += number
        return first, number

    def uncounted_metadata(self) -> CorruptImageError:
        """The error for clusters that would be taken but hold metadata."""
        return CorruptImageError(
            "a cluster that holds metadata has a refcount of 0, so nothing is allocated; run "
            "imagofs check",
            filename=self._storage.filename,
        )

    def _find(self, number: int) -> _Found:
        """Free runs of `number` clusters together, each within one block."""
        runs: list[HostRun] = []
        held: list[array[int] | None] = []
        used_free = 0
        rest: HostRun | None = None
        for first, count in self._free:
            if not number:
                break
            # It was in memory when the run was freed, but may have been forgotten since.
            held.append(self._need_block(first >> self.block_bits))
            used_free += 1
            taken = min(count, number)
            runs.append((first, taken))
            number -= taken
            if taken < count:
                rest = (first + taken, count - taken)
        cursor = self._cursor
        while number:
            first, count = self._free_run(cursor, number)
            held.append(self._need_block(first >> self.block_bits))
            runs.append((first, count))
            number -= count
            cursor = first + count
        return _Found(runs, cursor, used_free, rest, held)

    def _free_run(self, start: int, number: int) -> HostRun:
        """The first free run at or behind `start`, at most `number` clusters, within one block."""
        while True:
            index = start >> self.block_bits
            within = start & self._block_entries - 1
            block = self._need_block(index)
            if block is None:
                if index >= len(self.table):
                    raise TableFull
                # The first cluster of the range will hold the block itself.
                first = max(start, (index << self.block_bits) + 1)
                return first, min(number, (index + 1 << self.block_bits) - first)
            try:
                at = block.index(0, within)
            except ValueError:
                following = index + 1 << self.block_bits
                if start == self._cursor:
                    # Remember how far everything is taken, so that a retry does not begin anew.
                    self._cursor = following
                start = following
                continue
            count = 1
            limit = min(number, self._block_entries - at)
            while count < limit and block[at + count] == 0:
                count += 1
            return (index << self.block_bits) + at, count

    def _take(self, first: int, count: int) -> None:
        index = first >> self.block_bits
        if not self.table[index]:
            self._new_block(index)
        self._change_run(first, count, 1)

    def _new_block(self, index: int) -> None:
        """Make the block of a range that has none, in the range's first cluster.

        So it counts itself, and nothing else must be durable before it.
        """
        empty = unpack_refcounts(bytes(self._cluster_size), self._bits)
        self.blocks[index] = self._alive[index] = empty
        self._cache.put(self._namespace + index, empty)
        first = index << self.block_bits
        self.table[index] = first << self._cluster_bits
        self.new_blocks.add(index)
        self._own.add(first)
        self._change(first, 1)
        self.dirty_sectors[index] = set(range(self._cluster_size // _SECTOR))

    def take_virgin(self, first: int, count: int) -> bool:
        """Whether the clusters of a new run were never used, so that they read as zero.

        Asked once after the allocation, in order of position: what lies below counts as used.
        """
        virgin = first >= self._virgin
        self._virgin = max(self._virgin, first + count)
        return virgin

    # --- giving back ----------------------------------------------------------------------------

    def give_back(self, runs: Iterable[HostRun]) -> None:
        """Free clusters that nothing ever referred to: of a write that failed."""
        for first, count in runs:
            for cluster in range(first, first + count):
                # The block was changed by the allocation; it may be clean again and forgotten.
                if self._block_nowait(cluster >> self.block_bits) is None:
                    self.dropped[cluster] += 1
                else:
                    self._change(cluster, 0)
                    self._note_free(cluster)
            self.allocated -= count

    def check_reference(self, cluster: int, guest_offset: int) -> None:
        """See that a reference that is about to be dropped is counted.

        Raises:
            Missing: The block is not in memory.
            CorruptImageError: The count is lower than the references that are known.
        """
        if self.get(cluster) <= self.dropped[cluster]:
            raise CorruptImageError(
                f"the host cluster at {cluster << self._cluster_bits:#x} is used at guest offset "
                f"{guest_offset:#x} but has a refcount of {self.get(cluster)}; run imagofs check",
                filename=self._storage.filename,
            )

    def last_references(self, dropped: Counter[int]) -> list[int]:
        """Which of the clusters, all counted by one block, are free once `dropped` is taken off.

        Raises:
            Missing: The block is not in memory.
        """
        return sorted(cluster for cluster, times in dropped.items() if self.get(cluster) <= times)

    def take_off(self, dropped: Counter[int]) -> None:
        """Take durable dereferences off the counts, all of one block.

        Raises:
            Missing: The block is not in memory; nothing was changed.
        """
        for cluster, times in dropped.items():
            count = max(self.get(cluster) - times, 0)
            self._change(cluster, count)
            if not count:
                self._note_free(cluster)

    def _note_free(self, cluster: int) -> None:
        # What lies behind the cursor is found there.
        if cluster >= self._cursor:
            return
        if len(self._free) >= _MAX_FREE_RUNS:
            self._cursor = min(cluster, min(self._free)[0])
            self._free.clear()
            return
        # No run reaches from one block into the next.
        if cluster & self._block_entries - 1 and self._free and sum(self._free[-1]) == cluster:
            first, count = self._free[-1]
            self._free[-1] = (first, count + 1)
        else:
            self._free.append((cluster, 1))
