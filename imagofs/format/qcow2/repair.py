"""Repairing a qcow2 image.

References first, refcounts last. While a repair runs the image is marked dirty (version 3), so
that whoever opens it after a power cut knows what to think of its refcounts. Every step is durable
before the next one begins, and leaves an image that is no worse:

    1. the dirty bit
    2. what cannot be right is taken out of the tables: snapshots, bitmaps, L1, L2; what needs new
       room gets it behind the end of the file, and is referred to once it is durable
    3. refcounts and COPIED flags, as `rebuilding.py` does it
    4. the dirty and corrupt bits are cleared
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import CorruptImageError, FormatError, ReadOnlyError
from ...storage.base import Storage
from .check import Examination, Repair, examine
from .check_counts import Counts, differences
from .check_header import corrected_fields
from .check_report import CheckResult, Finding, Kind
from .check_scan import Progress
from .header import CORRUPT, DIRTY, KNOWN_AUTOCLEAR, Header
from .loading import read_header
from .rebuilding import (
    correct_copied_flags,
    free_runs,
    packed,
    rebuild_refcounts,
    write_changes,
    write_fields,
)
from .repair_entries import Losses, mend_l1_tables, mend_l2_tables
from .repair_header import mend_header
from .repair_sharing import unshare
from .repair_tables import mend_bitmaps, mend_snapshots

__all__ = ["repair_image"]

#: Each pass mends what the one before it laid open; more are not needed.
_MAX_PASSES = 20

_REFCOUNTS_ONLY = frozenset({Kind.LEAK, Kind.COPIED})


async def repair_image(
    storage: Storage, repair: Repair, *, progress: Progress | None = None
) -> CheckResult:
    """Check the image, repair it and check it again. As `check_image`."""
    if not storage.writable:
        raise ReadOnlyError("a repair needs to write to the image", filename=storage.filename)
    losses = Losses()
    findings: list[Finding] = []
    try:
        header = await read_header(storage)
    except FormatError as exc:
        if repair != "all":
            raise
        header = await mend_header(storage, exc, losses)
        findings.append(Finding(Kind.HEADER, exc.message))
    before = await examine(storage, header, progress=progress)
    if before.result.is_clean and not findings and not header.dirty and not header.corrupt:
        return before.result
    if repair == "leaks":
        header = await _give_back_leaks(storage, header, before, losses)
    else:
        header = await _repair_all(storage, header, before, losses, progress)
    after = (await examine(storage, header, progress=progress)).result
    if header.incompatible & (DIRTY | CORRUPT) and not after.corruptions and not after.check_errors:
        header = replace(header, incompatible=header.incompatible & ~(DIRTY | CORRUPT))
        await write_fields(storage, header)
    was = before.result
    return replace(
        after,
        corruptions_fixed=max(was.corruptions + len(findings) - after.corruptions, 0),
        leaks_fixed=max(was.leaks - after.leaks, 0),
        findings=(*findings, *was.findings),
        lost=tuple(losses.ranges),
        notes=tuple(losses.notes),
    )


async def _repair_all(
    storage: Storage,
    header: Header,
    examination: Examination,
    losses: Losses,
    progress: Progress | None,
) -> Header:
    header = await _mark_dirty(storage, corrected_fields(header))
    for _ in range(_MAX_PASSES):
        for mend in (mend_snapshots, mend_bitmaps):
            header, changed = await mend(storage, header, examination, losses)
            if changed:
                break
        else:
            for mend_tables in (mend_l1_tables, mend_l2_tables, unshare):
                changed = await mend_tables(storage, examination, losses)
                if changed:
                    await storage.sync()
                    break
            else:
                break
        examination = await examine(storage, header, progress=progress)
    else:
        raise CorruptImageError(
            "the image could not be repaired: each repair laid more damage open",
            filename=storage.filename,
        )
    return await rebuild_refcounts(storage, header, progress=progress, trust_structure=False)


async def _mark_dirty(storage: Storage, header: Header) -> Header:
    """Write the header, with the mark that refcounts cannot be trusted where there is one."""
    if header.version < 3:
        await write_fields(storage, header)
        return header
    header = replace(
        header,
        incompatible=header.incompatible | DIRTY,
        autoclear=header.autoclear & KNOWN_AUTOCLEAR,
    )
    await write_fields(storage, header)
    return header


async def _give_back_leaks(
    storage: Storage, header: Header, examination: Examination, losses: Losses
) -> Header:
    """Lower the refcounts that are higher than the references."""
    scan, stored, report = examination.scan, examination.stored, examination.report
    if scan.incomplete or report.check_errors or not examination.sound:
        if report.leaks:
            losses.notes.append(
                "leaked clusters were not given back: what seems leaked may belong to tables that "
                "are damaged; use --repair all"
            )
        return header
    only_refcounts = report.kinds <= _REFCOUNTS_ONLY
    if only_refcounts and (Kind.COPIED in report.kinds or _become_single(scan.counts, stored)):
        header = await _mark_dirty(storage, header)
    elif header.version >= 3 and header.autoclear & ~KNOWN_AUTOCLEAR:
        header = replace(header, autoclear=header.autoclear & KNOWN_AUTOCLEAR)
        await write_fields(storage, header)
    changed = False
    for start in sorted(stored.starts()):
        old, wanted = stored.piece(start), scan.counts.piece(start)
        new = old[:]
        for position, count, references in differences(old, wanted):
            if count > references:
                new[position] = references
        if new != old:
            place = stored.place(start)
            bits = stored.refcount_bits
            await write_changes(storage, place, packed(old, bits), packed(new, bits))
            changed = True
    if changed:
        await storage.sync()
    if only_refcounts:
        await correct_copied_flags(storage, scan)
    for first, number in free_runs(scan.counts, stored):
        await storage.discard(first << header.cluster_bits, number << header.cluster_bits)
    return header


def _become_single(counts: Counts, stored: Counts) -> bool:
    """Whether giving back leaks leaves clusters with one reference that had a higher count."""
    return any(
        references == 1 and count > 1
        for start in stored.starts()
        for _, references, count in differences(counts.piece(start), stored.piece(start))
    )
