"""Refcounts of a whole image: those that its references make, and those that it has stored.

Both are kept in chunks, each an `array` that counts for (a part of) one refcount block, so that
two chunks compare as two blocks of memory do. What has no chunk counts 0: a file that is large
only in name takes no room. Where numpy does the counting there is one chunk for all clusters.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator

from ...errors import UnsupportedError
from ...storage.base import Storage
from .entries import from_big_endian, unpack_refcounts
from .header import Header

__all__ = ["Counts", "StoredCounts", "differences", "read_bytes", "read_table"]

_MAX_CHUNK_BITS = 12
#: Memory for chunks in which next to nothing is counted, in bytes.
_SPARSE_BYTES = 24 << 20
#: For each reference there may be so many counts.
_SPARSE_FACTOR = 4
_STRETCH = 256
_FLAT_BITS = 62  # more clusters than a file can have
_TYPE_CODES = {8: "B", 16: "H", 32: "I", 64: "Q"}


async def read_bytes(storage: Storage, host_offset: int, length: int) -> bytearray:
    """Read without waiting where that works. Bytes past the end are zeroes."""
    data = bytearray(length)
    view = memoryview(data)
    if length and storage.readv_nowait((view,), host_offset) != length:
        await storage.readv([view], host_offset)
    return data


async def read_table(storage: Storage, host_offset: int, entries: int) -> array[int]:
    """Read 64-bit entries."""
    return from_big_endian(await read_bytes(storage, host_offset, entries * 8))


class Counts:
    """How many references each host cluster has.

    A count stops at what the image's width can hold; the rest is in `overflow`.

    Args:
        header: The image's header.
        clusters: Host clusters that there are.
        flat: Keep all counts in one chunk, which exists from the start.
        storage: The image file: the more room it takes, the more memory its counts may.
    """

    def __init__(
        self, header: Header, clusters: int, *, flat: bool = False, storage: Storage | None = None
    ) -> None:
        self.clusters = clusters
        self._storage = storage
        #: log2 of the clusters of a piece, which never reaches beyond a refcount block.
        self.piece_bits = min(_MAX_CHUNK_BITS, header.cluster_bits + 3 - header.refcount_order)
        #: log2 of the clusters of a chunk: a piece, or all.
        self.bits = _FLAT_BITS if flat else self.piece_bits
        self.refcount_bits = header.refcount_bits
        self.maximum = (1 << header.refcount_bits) - 1
        self.typecode = _TYPE_CODES[max(8, header.refcount_bits)]
        self.chunks: dict[int, array[int]] = {}
        self._room = self._counted = 0
        #: References beyond `maximum`, by host cluster.
        self.overflow: Counter[int] = Counter()
        # No run that is asked about is longer than a piece or an L2 table.
        length = min(max(1 << self.piece_bits, header.cluster_size // 8), clusters)
        self._zeros = array(self.typecode, [0]) * length
        self._ones = array(self.typecode, [1]) * length
        if flat:
            self.chunks[0] = array(self.typecode, bytes(clusters * self._zeros.itemsize))

    @property
    def flat(self) -> array[int] | None:
        """The one chunk, if there is just one."""
        return self.chunks[0] if self.bits == _FLAT_BITS else None

    def starts(self) -> Iterator[int]:
        """The first clusters of all pieces that are not all 0."""
        flat = self.flat
        if flat is None:
            yield from (number << self.bits for number in self.chunks)
            return
        step = 1 << self.piece_bits
        for start in range(0, self.clusters, step):
            if flat[start : start + step] != self._zeros[: min(step, self.clusters - start)]:
                yield start

    def piece(self, start: int) -> array[int]:
        """The counts of the piece that begins with the cluster `start`; not to be changed."""
        chunk = self.chunks.get(start >> self.bits)
        if chunk is None:
            return self._zeros[: min(1 << self.piece_bits, self.clusters - start)]
        return (
            chunk if self.bits == self.piece_bits else chunk[start : start + (1 << self.piece_bits)]
        )

    def get(self, cluster: int) -> int:
        """The count of a cluster, at most `maximum`; 0 behind the end of the file."""
        if cluster >= self.clusters:
            return 0
        chunk = self.chunks.get(cluster >> self.bits)
        return 0 if chunk is None else chunk[cluster & (1 << self.bits) - 1]

    def add(self, first: int, number: int, times: int = 1) -> bool:
        """Count `times` more references to each of `number` clusters, as far as they exist.

        Returns:
            Whether none of them had a reference before.

        Raises:
            UnsupportedError: Those that were counted are spread too thinly.
        """
        bits, fresh = self.bits, True
        end = min(first + number, self.clusters)
        while first < end:
            index = first >> bits
            low = first & (1 << bits) - 1
            high = min(end - (index << bits), 1 << bits)
            chunk = self.chunks.get(index)
            if chunk is None:
                chunk = self.chunks[index] = self.piece(index << bits)
                self._check_room(chunk)
            self._counted += high - low
            if high - low == 1:
                if chunk[low] or times > 1:
                    fresh = self._add_each(chunk, index, low, high, times) and fresh
                else:
                    chunk[low] = 1
            elif times == 1 and chunk[low:high] == self._zeros[: high - low]:
                chunk[low:high] = self._ones[: high - low]
            else:
                fresh = self._add_each(chunk, index, low, high, times) and fresh
            first = (index << bits) + high
        return fresh

    def _check_room(self, chunk: array[int]) -> None:
        """See that a new chunk is worth its memory.

        References that are far from each other take a chunk each: a hostile image of a MiB could
        ask for gigabytes.
        """
        self._room += len(chunk) * chunk.itemsize
        allowed = _SPARSE_BYTES + _SPARSE_FACTOR * self._counted * chunk.itemsize
        if self._storage is not None and self._room > allowed + (
            self._storage.allocated_bytes() >> 3
        ):
            raise UnsupportedError(
                f"its clusters are spread over {self.clusters} so thinly that counting their "
                f"references would take too much memory",
                filename=self._storage.filename,
            )

    def _add_each(self, chunk: array[int], index: int, low: int, high: int, times: int) -> bool:
        fresh = True
        for position in range(low, high):
            before = chunk[position]
            after = before + times
            if before:
                fresh = False
            if after > self.maximum:
                self.overflow[(index << self.bits) + position] += after - self.maximum
                after = self.maximum
            chunk[position] = after
        return fresh

    def are_all_one(self, first: int, number: int) -> bool:
        """Whether each of the clusters has exactly one reference."""
        return all(
            chunk is not None and chunk[low:high] == self._ones[: high - low]
            for chunk, low, high in pieces(self.chunks, self.bits, first, number)
        )

    def is_none_one(self, first: int, number: int) -> bool:
        """Whether none of the clusters has exactly one reference."""
        return not any(
            chunk is not None and chunk[low:high].count(1)
            for chunk, low, high in pieces(self.chunks, self.bits, first, number)
        )


def differences(wanted: array[int], found: array[int]) -> Iterator[tuple[int, int, int]]:
    """(position, one count, the other) wherever two pieces differ.

    What is equal is passed over a stretch at a time.
    """
    for start in range(0, len(wanted), _STRETCH):
        ours, theirs = wanted[start : start + _STRETCH], found[start : start + _STRETCH]
        if ours != theirs:
            for position, (one, other) in enumerate(zip(ours, theirs, strict=True), start):
                if one != other:
                    yield position, one, other


def pieces(
    chunks: dict[int, array[int]], bits: int, first: int, number: int
) -> Iterator[tuple[array[int] | None, int, int]]:
    """The chunk (None: all 0), and the positions in it, of each piece of a run of clusters."""
    end = first + number
    while first < end:
        index = first >> bits
        high = min(end - (index << bits), 1 << bits)
        yield chunks.get(index), first & (1 << bits) - 1, high
        first = (index << bits) + high


class StoredCounts(Counts):
    """The refcounts as the image has them, for all its host clusters.

    Attributes:
        table: The refcount table's entries.
        unreadable: Indexes of blocks that are where no block can be, so that their counts are not
            known.
    """

    def __init__(
        self, header: Header, clusters: int, table: array[int], *, flat: bool = False
    ) -> None:
        super().__init__(header, clusters, flat=flat)
        self.table = table
        self.unreadable: set[int] = set()
        self._cluster_mask = header.cluster_size - 1
        self.block_bits = header.cluster_bits + 3 - header.refcount_order

    async def load(self, storage: Storage) -> None:
        """Read all blocks that count for clusters of the file.

        Raises:
            StorageError: One cannot be read.
        """
        size = storage.size()
        by_place: dict[int, array[int]] = {}
        for index, entry in enumerate(self.table):
            if index << self.block_bits >= self.clusters:
                break
            offset = entry & ~511
            if not offset:
                continue
            if offset & self._cluster_mask or offset >> 63:
                self.unreadable.add(index)
            elif offset < size:
                await self._load_block(storage, index, offset, by_place)

    async def _load_block(
        self, storage: Storage, index: int, offset: int, by_place: dict[int, array[int]]
    ) -> None:
        first = index << self.block_bits
        end = min(first + (1 << self.block_bits), self.clusters)
        for start in range(first, end, 1 << self.piece_bits):
            length = min(1 << self.piece_bits, end - start)
            place = offset + ((start - first) * self.refcount_bits >> 3)
            found = by_place.get(place)
            if found is None or len(found) != length:
                data = await read_bytes(storage, place, length * self.refcount_bits + 7 >> 3)
                if data == bytes(len(data)):
                    continue
                found = unpack_refcounts(data, self.refcount_bits)[:length]
                # Two entries may name one block, a million of them too: it is kept once.
                by_place[place] = found
            if self.bits == self.piece_bits:
                self.chunks[start >> self.bits] = found
            else:
                self.chunks[0][start : start + length] = found

    def place(self, start: int) -> int:
        """Host offset of the stored piece that begins with the cluster `start`."""
        index = start >> self.block_bits
        within = start - (index << self.block_bits)
        return self.table[index] + (within * self.refcount_bits >> 3)

    def is_unreadable(self, cluster: int) -> bool:
        """Whether the cluster's count is not known."""
        return bool(self.unreadable) and cluster >> self.block_bits in self.unreadable
