"""Which host clusters hold metadata: guest data is never written there, and nothing is allocated.

Tables of many clusters are kept as ranges: 65,536 snapshots may each have an L1 table of 32 MiB.
L2 tables and refcount blocks are single clusters; an image may have millions of them.
"""

from __future__ import annotations

from bisect import bisect_right, insort

__all__ = ["MOST_BITS", "MOST_IN_A_SET", "OwnClusters"]

#: Single clusters that are kept in a set (some 20 MiB); more become bits.
MOST_IN_A_SET = 1 << 18
#: Clusters of a file for which there are bits (64 MiB).
MOST_BITS = 1 << 29


class _Bits:
    """A set of numbers, one bit for each small one."""

    __slots__ = ("_bits", "_large")

    def __init__(self) -> None:
        self._bits = bytearray()
        self._large: set[int] = set()

    def __contains__(self, number: int) -> bool:
        index = number >> 3
        if index < len(self._bits):
            return bool(self._bits[index] >> (number & 7) & 1)
        return number in self._large

    def add(self, number: int) -> None:
        index = number >> 3
        if number >= MOST_BITS:
            self._large.add(number)
            return
        if index >= len(self._bits):
            size = min(2 * index + 4096, MOST_BITS >> 3)
            self._bits += bytes(size - len(self._bits))
        self._bits[index] |= 1 << (number & 7)

    def discard(self, number: int) -> None:
        if number >= MOST_BITS:
            self._large.discard(number)
        elif number in self:
            self._bits[number >> 3] &= ~(1 << (number & 7))


class OwnClusters:
    """A set of host clusters, by number. It begins with the header's."""

    __slots__ = ("_count", "_ends", "_highest", "_singles", "_starts")

    def __init__(self) -> None:
        self._starts = [0]  # of ranges, in order; none overlaps another
        self._ends = [1]
        self._singles: set[int] | _Bits = set()
        self._count = 0
        self._highest = 0

    def __contains__(self, cluster: int) -> bool:
        if cluster in self._singles:
            return True
        if not self._ends or cluster >= self._ends[-1]:
            return False
        index = bisect_right(self._starts, cluster) - 1
        return index >= 0 and cluster < self._ends[index]

    def reach(self, cluster: int) -> bool:
        """Whether any cluster from this one on is, or once was, in the set."""
        return self._highest >= cluster

    def overlaps(self, clusters: range) -> bool:
        """Whether any of the consecutive `clusters` is in the set."""
        # The last range that begins before the end of `clusters` ends last of all those.
        index = bisect_right(self._starts, clusters.stop - 1) - 1
        if clusters and index >= 0 and self._ends[index] > clusters.start:
            return True
        if self._highest < clusters.start:
            return False
        return bool(self._count) and any(cluster in self._singles for cluster in clusters)

    def add_range(self, clusters: range) -> None:
        """Enter consecutive clusters, none of which is in the set."""
        if clusters:
            insort(self._starts, clusters.start)
            self._ends.insert(bisect_right(self._starts, clusters.start) - 1, clusters.stop)
            self._highest = max(self._highest, clusters.stop - 1)

    def remove_range(self, clusters: range) -> None:
        """Take out a range as it was entered."""
        if clusters:
            index = bisect_right(self._starts, clusters.start) - 1
            assert (self._starts[index], self._ends[index]) == (clusters.start, clusters.stop)
            del self._starts[index], self._ends[index]

    def add(self, cluster: int) -> None:
        """Enter a single cluster that is not in the set."""
        singles = self._singles
        if self._count == MOST_IN_A_SET and isinstance(singles, set):
            bits = _Bits()
            for other in singles:
                bits.add(other)
            self._singles = singles = bits
        singles.add(cluster)
        self._count += 1
        if cluster > self._highest:
            self._highest = cluster

    def discard(self, cluster: int) -> None:
        """Take out a single cluster."""
        if cluster in self._singles:
            self._singles.discard(cluster)
            self._count -= 1
