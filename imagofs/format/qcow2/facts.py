"""What `qemu-img info` says of a qcow2 image, as JSON values. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bitmaps import AUTO, IN_USE, Bitmap
from .header import Header
from .snapshots import Snapshot

__all__ = ["format_facts", "snapshot_facts"]

_ENCRYPTIONS = {1: "aes", 2: "luks"}


def format_facts(header: Header, bitmaps: Sequence[Bitmap] = ()) -> dict[str, Any]:
    """The format-specific data.

    Args:
        header: The image's header.
        bitmaps: Its persistent bitmaps, as far as they were read.
    """
    facts: dict[str, Any] = {
        "compat": "1.1" if header.version >= 3 else "0.10",
        "compression-type": header.compression_name,
    }
    if header.version >= 3:
        facts["lazy-refcounts"] = header.lazy_refcounts
    if bitmaps:
        facts["bitmaps"] = [_bitmap_facts(bitmap) for bitmap in bitmaps]
    facts["refcount-bits"] = header.refcount_bits
    if header.has_data_file:
        facts["data-file"] = header.data_file
        facts["data-file-raw"] = header.data_file_raw
    if header.crypt_method:
        facts["encrypt"] = {"format": _ENCRYPTIONS.get(header.crypt_method, "unknown")}
    if header.version >= 3:
        facts["corrupt"] = header.corrupt
        facts["extended-l2"] = header.extended_l2
    return facts


def _bitmap_facts(bitmap: Bitmap) -> dict[str, Any]:
    flags = [name for flag, name in ((IN_USE, "in-use"), (AUTO, "auto")) if bitmap.flags & flag]
    return {"name": bitmap.name, "granularity": 1 << bitmap.granularity_bits, "flags": flags}


def snapshot_facts(snapshot: Snapshot) -> dict[str, Any]:
    """One internal snapshot."""
    seconds, nanoseconds = divmod(snapshot.vm_clock_nsec, 10**9)
    facts: dict[str, Any] = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": seconds,
        "vm-clock-nsec": nanoseconds,
    }
    if snapshot.icount is not None:
        facts["icount"] = snapshot.icount
    return facts
