"""Headers that no program opens, although the guest's data can still be found."""

from __future__ import annotations

from ...errors import FormatError
from ...storage.base import Storage
from .check_counts import read_bytes
from .header import MAX_CLUSTER_BITS, Header, parse_header
from .rebuilding import append, write_fields
from .repair_entries import Losses

__all__ = ["mend_header"]

_REFTABLE_OFFSET, _REFTABLE_CLUSTERS = 48, 56
_SNAPSHOT_COUNT, _SNAPSHOTS_OFFSET = 60, 64


async def mend_header(storage: Storage, error: FormatError, losses: Losses) -> Header:
    """Put another place in the header for what is misplaced and can be made anew, or done without.

    That is the refcount table, which is made anew, and the snapshot table. Where guest data is
    only the L1 table knows: without it nothing can be repaired.

    Args:
        storage: The image file.
        error: Why the header is refused.
        losses: Where it is noted if the snapshots are gone.

    Returns:
        The header as it is now.

    Raises:
        FormatError: `error`, if this does not help.
        StorageError: Something cannot be read or written.
    """
    data = await read_bytes(storage, 0, min(1 << MAX_CLUSTER_BITS, storage.size()))
    cluster_size = 1 << min(int.from_bytes(data[20:24], "big"), MAX_CLUSTER_BITS)
    data = data[:cluster_size]
    behind_the_end = storage.size() + -storage.size() % cluster_size
    for table, snapshots in ((True, False), (False, True), (True, True)):
        changed = data[:]
        if table:
            changed[_REFTABLE_OFFSET:_REFTABLE_CLUSTERS] = behind_the_end.to_bytes(8, "big")
            changed[_REFTABLE_CLUSTERS:_SNAPSHOT_COUNT] = (1).to_bytes(4, "big")
        if snapshots:
            changed[_SNAPSHOT_COUNT : _SNAPSHOTS_OFFSET + 8] = bytes(12)
        header = _parse(bytes(changed), storage, new_table=table)
        if header is None:
            continue
        if table:
            place = await append(storage, header, bytes(cluster_size))
            assert place == header.reftable_offset
            await storage.sync()
        await write_fields(storage, header)
        if snapshots:
            losses.notes.append("all snapshots are lost: the snapshot table was not found")
        return header
    raise error


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
