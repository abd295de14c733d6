"""Fields of a header that contradict each other, though the image can be opened. Pure functions."""

from __future__ import annotations

from dataclasses import replace

from .header import BITMAPS, RAW_EXTERNAL_DATA, Header

__all__ = ["corrected_fields", "wrong_fields"]


def wrong_fields(header: Header) -> list[str]:
    """What contradicts itself, in words."""
    wrong: list[str] = []
    if header.autoclear & BITMAPS and header.bitmaps is None:
        wrong.append("the autoclear bit for bitmaps is set, but the header names no bitmaps")
    if header.autoclear & RAW_EXTERNAL_DATA and not header.has_data_file:
        wrong.append("the autoclear bit for a raw data file is set, but there is no data file")
    if _has_stray_snapshots(header):
        wrong.append(
            f"there are no snapshots, but a snapshot table at {header.snapshots_offset:#x}"
        )
    return wrong


def corrected_fields(header: Header) -> Header:
    """The header without these contradictions."""
    autoclear = header.autoclear
    if header.bitmaps is None:
        autoclear &= ~BITMAPS
    if not header.has_data_file:
        autoclear &= ~RAW_EXTERNAL_DATA
    place = 0 if _has_stray_snapshots(header) else header.snapshots_offset
    return replace(header, autoclear=autoclear, snapshots_offset=place)


def _has_stray_snapshots(header: Header) -> bool:
    # Other programs look at the place even if nothing is there.
    offset = header.snapshots_offset
    return not header.snapshot_count and bool(offset & header.cluster_size - 1 or offset >> 63)
