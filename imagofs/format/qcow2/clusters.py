"""What an L2 entry says about its cluster and subclusters. Pure functions."""

from __future__ import annotations

from .entries import COMPRESSED, COPIED, OFFSET_MASK, READS_AS_ZERO

__all__ = [
    "ALLOCATED_BITS",
    "SUBCLUSTERS",
    "ZERO_SHIFT",
    "Kind",
    "kind_of_cluster",
    "kind_of_subcluster",
]

#: Subclusters per cluster, with extended L2 entries.
SUBCLUSTERS = 32
#: Second word of an extended entry: bits 0 to 31, subcluster allocated; 32 to 63, reads as zero.
ALLOCATED_BITS = (1 << 32) - 1
ZERO_SHIFT = 32

#: What a (sub)cluster is. Plain integers: this is asked for each granule that is resolved.
Kind = int
UNALLOCATED: Kind = 0  #: the layer below shows through
DATA: Kind = 1  #: its bytes are at the host offset
ZEROES: Kind = 2  #: reads as zero, with or without a host offset
COMPRESSED_DATA: Kind = 3
WRONG: Kind = 4  #: the entry contradicts itself or the header


def kind_of_cluster(entry: int, *, version: int, data_file: bool) -> Kind:
    """Classify a 64-bit L2 entry ("Standard Cluster Descriptor", "Compressed ...").

    Whether the host offset is aligned and inside the file is not looked at here.
    """
    if entry & COMPRESSED:
        return WRONG if data_file else COMPRESSED_DATA
    if entry & READS_AS_ZERO:
        return ZEROES if version >= 3 else WRONG
    if entry & OFFSET_MASK or (data_file and entry & COPIED):
        return DATA
    return UNALLOCATED


def kind_of_subcluster(entry: int, bitmap: int, number: int, *, data_file: bool) -> Kind:
    """Classify one subcluster of a 128-bit L2 entry ("Extended L2 Entries").

    Args:
        entry: The first word.
        bitmap: The second word.
        number: 0 to 31, counted in the order of guest offsets.
        data_file: Whether the image has an external data file.
    """
    if entry & COMPRESSED:
        return WRONG if data_file or bitmap else COMPRESSED_DATA
    allocated = bitmap >> number & 1
    zero = bitmap >> ZERO_SHIFT + number & 1
    if (allocated and zero) or entry & READS_AS_ZERO:
        return WRONG
    if zero:
        return ZEROES
    if not allocated:
        return UNALLOCATED
    if entry & OFFSET_MASK or (data_file and entry & COPIED):
        return DATA
    return WRONG
