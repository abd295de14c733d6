"""Headers that no program opens, although the guest's data can still be found."""

from __future__ import annotations

from itertools import combinations

from ...errors import FormatError
from ...storage.base import Storage
from .check_counts import read_bytes
from .header import (
    BITMAPS,
    MAGIC,
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    Header,
    parse_header,
)
from .rebuilding import append, write_fields
from .repair_entries import Losses

__all__ = ["mend_header"]

_REFTABLE_OFFSET, _REFTABLE_CLUSTERS = 48, 56
_SNAPSHOT_COUNT, _SNAPSHOTS_OFFSET = 60, 64
#: The lowest bytes of the version and of the autoclear features.
_VERSION_END, _AUTOCLEAR_END = 7, 95
_WHAT = ("table", "snapshots", "bitmaps")
#: What may be misplaced, as little as possible first.
_COMBINATIONS = [what for number in (1, 2, 3) for what in combinations(_WHAT, number)]


async def mend_header(storage: Storage, error: FormatError, losses: Losses) -> Header:
    """Put another place in the header for what is misplaced and can be made anew, or done without.

    That is the refcount table, which is made anew, the snapshot table and the bitmap directory.
    Where guest data is only the L1 table knows: without it nothing can be repaired.

    Args:
        storage: The image file.
        error: Why the header is refused.
        losses: Where it is noted if snapshots or bitmaps are gone.

    Returns:
        The header as it is now.

    Raises:
        FormatError: `error`, if this does not help.
        StorageError: Something cannot be read or written.
    """
    data = await read_bytes(storage, 0, min(1 << MAX_CLUSTER_BITS, storage.size()))
    cluster_bits = int.from_bytes(data[20:24], "big")
    if data[:4] != MAGIC or not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise error
    cluster_size = 1 << cluster_bits
    data = data[:cluster_size] + bytes(max(0, _AUTOCLEAR_END + 1 - len(data)))
    behind_the_end = storage.size() + -storage.size() % cluster_size
    for what in _COMBINATIONS:
        header = _parse(_changed(data, what, behind_the_end), storage, new_table="table" in what)
        if header is None:
            continue
        if "table" in what:
            place = await append(storage, header, bytes(cluster_size))
            assert place == header.reftable_offset
            await storage.sync()
        await write_fields(storage, header)
        for lost in ("snapshots", "bitmaps"):
            if lost in what:
                losses.note(f"all {lost} are lost: what the header says of them cannot be right")
        return header
    raise error


def _changed(data: bytearray, what: tuple[str, ...], behind_the_end: int) -> bytes:
    changed = data[:]
    if "table" in what:
        changed[_REFTABLE_OFFSET:_REFTABLE_CLUSTERS] = behind_the_end.to_bytes(8, "big")
        changed[_REFTABLE_CLUSTERS:_SNAPSHOT_COUNT] = (1).to_bytes(4, "big")
    if "snapshots" in what:
        changed[_SNAPSHOT_COUNT : _SNAPSHOTS_OFFSET + 8] = bytes(12)
    if "bitmaps" in what and changed[_VERSION_END] >= 3:
        changed[_AUTOCLEAR_END] &= ~BITMAPS & 0xFF
    return bytes(changed)


def _parse(data: bytes, storage: Storage, *, new_table: bool) -> Header | None:
    try:
        header = parse_header(data, storage.filename)
    except FormatError:
        return None
    size = storage.size()
    reftable_end = header.reftable_offset + (header.reftable_clusters << header.cluster_bits)
    if header.l1_offset + header.l1_entries * 8 > size:
        return None
    if not new_table and reftable_end > size:
        return None
    if header.snapshot_count and header.snapshots_offset >= size:
        return None
    return header
