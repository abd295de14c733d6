"""What a qcow2 layer says of its clusters, in more detail than a mapping: for `imagofs map`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...errors import CorruptImageError
from .clusters import (
    DATA,
    SUBCLUSTERS,
    UNALLOCATED,
    WRONG,
    Kind,
    kind_of_cluster,
    kind_of_subcluster,
)
from .entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    REFTABLE_RESERVED,
    from_big_endian,
    unpack_refcounts,
)

if TYPE_CHECKING:
    from array import array

    from .driver import Qcow2

__all__ = ["ClusterRun", "cluster_run", "is_preallocated"]

_MAX_BYTES = 1 << 40


class ClusterRun(NamedTuple):
    """Guest bytes of one kind whose host space, if any, lies in one piece.

    Attributes:
        length: Guest bytes, above zero.
        kind: UNALLOCATED, DATA, ZEROES or COMPRESSED_DATA.
        host_offset: Where the first byte has its host space, whatever it reads as; None: nowhere.
    """

    length: int
    kind: Kind
    host_offset: int | None


async def cluster_run(driver: Qcow2, guest_offset: int, max_length: int) -> ClusterRun:
    """The run that begins at `guest_offset`, as long as is cheap to say.

    Args:
        driver: The layer.
        guest_offset: Below the disk's size, in bytes.
        max_length: Bytes that are of interest, above zero.

    Raises:
        CorruptImageError: The table entry is wrong.
        StorageError: A table cannot be read.
    """
    l2 = driver.metadata.l2
    end = min(guest_offset + min(max_length, _MAX_BYTES), driver.size())
    number = guest_offset >> l2.slice_bits
    table = await l2.load_slice(number)
    if table is None:
        index = guest_offset >> l2.l1_bits
        while index << l2.l1_bits < end and not l2.l1[index] & OFFSET_MASK:
            index += 1
        return ClusterRun(min(index << l2.l1_bits, end) - guest_offset, UNALLOCATED, None)
    end = min(end, number + 1 << l2.slice_bits)
    kind, host_offset = _piece(driver, table, guest_offset)
    if driver.header.extended_l2:
        position = _subclusters_end(driver, table, guest_offset, end, kind, host_offset)
    else:
        position = _clusters_end(driver, table, guest_offset, end)
    return ClusterRun(min(position, end) - guest_offset, kind, host_offset)


def _piece(driver: Qcow2, table: array[int], guest_offset: int) -> tuple[Kind, int | None]:
    """Kind of the (sub)cluster, and the host offset of `guest_offset` itself.

    Raises:
        CorruptImageError: The entry is wrong.
    """
    header, l2 = driver.header, driver.metadata.l2
    index = guest_offset >> header.cluster_bits & l2.slice_mask
    entry = table[index * l2.entry_words]
    data_file = header.has_data_file
    if header.extended_l2:
        number = guest_offset >> header.cluster_bits - 5 & SUBCLUSTERS - 1
        kind = kind_of_subcluster(entry, table[2 * index + 1], number, data_file=data_file)
    else:
        kind = kind_of_cluster(entry, version=header.version, data_file=data_file)
    if entry & COMPRESSED and kind != WRONG:
        return kind, None
    place = entry & OFFSET_MASK
    if kind == WRONG or place & header.cluster_size - 1:
        raise driver.wrong_entry(entry, guest_offset)
    # In a data file, offset 0 is a place as any other.
    is_first = data_file and entry & COPIED and (kind == DATA or header.extended_l2)
    if not place and not is_first:
        return kind, None
    return kind, place + (guest_offset & header.cluster_size - 1)


def _clusters_end(driver: Qcow2, table: array[int], guest_offset: int, end: int) -> int:
    """Where the run ends that the cluster at `guest_offset` begins, or a part of it."""
    header, l2 = driver.header, driver.metadata.l2
    bits = header.cluster_bits
    index = guest_offset >> bits & l2.slice_mask
    entry = table[index]
    step = header.cluster_size if entry & OFFSET_MASK or entry & COPIED else 0
    position = (guest_offset >> bits) + 1 << bits
    if entry & COMPRESSED:
        # Each has a place of its own, which nobody asks for.
        while position < end and table[position >> bits & l2.slice_mask] & COMPRESSED:
            position += header.cluster_size
        return position
    while position < end:
        entry += step
        if table[position >> bits & l2.slice_mask] != entry:
            break
        position += header.cluster_size
    return position


def _subclusters_end(
    driver: Qcow2,
    table: array[int],
    guest_offset: int,
    end: int,
    kind: Kind,
    host_offset: int | None,
) -> int:
    """As `_clusters_end`, subcluster by subcluster."""
    unit = driver.granularity
    position = (guest_offset | unit - 1) + 1
    while position < end:
        try:
            found = _piece(driver, table, position)
        except CorruptImageError:
            break
        expected = None if host_offset is None else host_offset + position - guest_offset
        if found != (kind, expected):
            break
        position += unit
    return position


async def is_preallocated(driver: Qcow2) -> bool:
    """Whether the file takes clearly less space than its refcounts say.

    Then clusters were counted ahead, and where the file has holes they read as zero. The threshold
    is qemu's.
    """
    header, storage = driver.header, driver.storages[0]
    bits = header.cluster_bits
    taken = storage.allocated_bytes() >> bits
    threshold = max(taken * 10 // 9, taken + 2)
    clusters = storage.size() + header.cluster_size - 1 >> bits
    if clusters < threshold:
        return False
    table = from_big_endian(
        await storage.read_table(header.reftable_clusters << bits, header.reftable_offset)
    )
    block_bits = bits + 3 - header.refcount_order
    counted = 0
    for index, offset in enumerate(table):
        left = clusters - (index << block_bits)
        if left <= 0 or counted >= threshold:
            break
        if not offset:
            continue
        if offset & (REFTABLE_RESERVED | header.cluster_size - 1) or offset >= storage.size():
            return False
        block = await storage.read_table(header.cluster_size, offset)
        counts = unpack_refcounts(block, header.refcount_bits)[:left]
        counted += len(counts) - counts.count(0)
    return counted >= threshold
