"""L2 tables of large images, a table at a time with numpy.

Only what is healthy is followed here; a table with anything odd in it is left to `L2Walk`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ...storage.base import Storage
from .check_l2 import L2Walk, odd_bits
from .clusters import ALLOCATED_BITS, ZERO_SHIFT
from .entries import COMPRESSED, COPIED, OFFSET_MASK
from .header import Header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .check_scan import Scan, Table

    Words = NDArray[np.uint64]

__all__ = ["Vectorised", "can_be_flat"]

#: Importing numpy takes longer than to check a small image without it.
_WORTHWHILE_CLUSTERS = 1 << 18


def can_be_flat(storage: Storage, header: Header) -> bool:
    """Whether one array may count for all clusters, as this module needs it.

    It must not take more room than the file really has: a file can be large in name only.
    """
    clusters = storage.size() >> header.cluster_bits
    room = clusters * max(header.refcount_bits, 8) >> 3
    return (
        clusters >= _WORTHWHILE_CLUSTERS
        and room <= storage.allocated_bytes()
        and find_spec("numpy") is not None
    )


class Vectorised:
    """Follows whole tables.

    Args:
        scan: What counts, with flat counts.
    """

    def __init__(self, scan: Scan) -> None:
        import numpy as np

        header = scan.header
        self._np = np
        self._scan = scan
        assert scan.counts.flat is not None
        self._counts: NDArray[Any] = np.asarray(scan.counts.flat)
        self._stored: NDArray[Any] | None = None
        if scan.stored is not None and scan.stored.flat is not None:
            self._stored = np.asarray(scan.stored.flat)
        self._bits = np.uint64(header.cluster_bits)
        self._odd = np.uint64(odd_bits(header.version, header.extended_l2, header.cluster_size))
        self._compressed_bit = np.uint64(COMPRESSED)
        self._offset_mask = np.uint64(OFFSET_MASK)
        self._copied_shift = np.uint64(COPIED.bit_length() - 1)

    def follow(self, data: bytearray, walk: L2Walk, table: Table) -> bool:
        """Follow a table if it is healthy.

        Args:
            data: Its bytes.
            walk: Knows how to say what is wrong with an entry.
            table: Who refers to it.

        Returns:
            Whether it was; if not, nothing was counted.
        """
        np, scan, header = self._np, self._scan, self._scan.header
        if header.has_data_file:
            return False
        words = np.frombuffer(data, dtype=">u8").astype(np.uint64)
        bitmaps = words[:0]
        if header.extended_l2:
            words, bitmaps = words[0::2], words[1::2]
        compressed = words & self._compressed_bit != 0
        if (words[~compressed] & self._odd).any():
            return False
        allocated = (words & self._offset_mask != 0) & ~compressed
        if bitmaps.size and self._contradicts(bitmaps, allocated, compressed):
            return False
        indexes = np.flatnonzero(allocated)
        clusters = ((words[indexes] & self._offset_mask) >> self._bits).astype(np.int64)
        everything, places = clusters, indexes
        if compressed.any():
            found = self._compressed(words, compressed)
            if found is None:
                return False
            everything = np.concatenate((clusters, found[0]))
            places = np.concatenate((indexes, found[1]))
        if everything.size:
            if everything.max() >= scan.clusters or not self._count(everything, table.times):
                return False
            for position in np.flatnonzero(self._counts[everything] > table.times):
                walk.is_shared(int(places[position]), int(everything[position]))
        if table.active:
            self._statistics(table.active, clusters, int(compressed.sum()))
            self._flags(words, indexes, clusters, walk)
        return True

    def _contradicts(
        self, bitmaps: Words, allocated: NDArray[np.bool_], compressed: NDArray[np.bool_]
    ) -> bool:
        np = self._np
        mask = np.uint64(ALLOCATED_BITS)
        both = bitmaps & bitmaps >> np.uint64(ZERO_SHIFT) & mask
        return bool(
            both[allocated].any()
            or bitmaps[compressed].any()
            or (bitmaps[~allocated & ~compressed] & mask).any()
        )

    def _compressed(
        self, words: Words, compressed: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Host clusters of compressed clusters, and the entries they belong to."""
        np, scan = self._np, self._scan
        indexes = np.flatnonzero(compressed)
        entries = words[indexes]
        if (entries >> self._copied_shift).any():
            return None
        offset_bits = 62 - (scan.cluster_bits - 8)
        offsets = (entries & np.uint64((1 << offset_bits) - 1)).astype(np.int64)
        sectors = entries >> np.uint64(offset_bits) & np.uint64((1 << scan.cluster_bits - 8) - 1)
        ends = (offsets >> 9) + sectors.astype(np.int64) + 1 << 9
        first, last = offsets >> scan.cluster_bits, ends - 1 >> scan.cluster_bits
        if (last - first > 1).any():
            return None
        second = last > first
        return np.concatenate((first, last[second])), np.concatenate((indexes, indexes[second]))

    def _count(self, clusters: NDArray[np.int64], times: int) -> bool:
        """Count references, unless one would not fit the width."""
        np, counts = self._np, self._counts
        maximum = self._scan.counts.maximum
        if int(counts[clusters].max()) + clusters.size * times > maximum:
            different, number = np.unique(clusters, return_counts=True)
            if (counts[different].astype(np.float64) + number * float(times) > maximum).any():
                return False
        np.add.at(counts, clusters, counts.dtype.type(times))
        return True

    def _statistics(self, active: int, clusters: NDArray[np.int64], compressed: int) -> None:
        scan = self._scan
        breaks = int((self._np.diff(clusters) != 1).sum()) if clusters.size else 0
        scan.allocated += (clusters.size + compressed) * active
        scan.fragmented += (breaks + compressed) * active
        scan.compressed += compressed * active

    def _flags(
        self,
        words: Words,
        indexes: NDArray[np.int64],
        clusters: NDArray[np.int64],
        walk: L2Walk,
    ) -> None:
        if self._stored is None:
            return
        copied = words[indexes] >> self._copied_shift != 0
        wrong = self._np.flatnonzero((self._stored[clusters] == 1) != copied)
        for position in wrong.tolist():
            walk.check_copied(
                int(indexes[position]), 1, int(clusters[position]), bool(copied[position])
            )
