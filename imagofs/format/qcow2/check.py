"""Checking a qcow2 image: is every reference possible, and is every refcount right?

The counts are those of `qemu-img check`: a damaged entry counts once for each state of the disk
that sees it, a refcount that is too low is a corruption, one that is too high a leak. Beyond that,
metadata in a host cluster that something else uses is a corruption even if the refcount knows of
both.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ...errors import FormatError
from ...storage.base import Storage
from .check_counts import StoredCounts, differences, read_table
from .check_numpy import can_be_flat
from .check_report import CheckResult, Kind, Report
from .check_scan import Progress, Scan

if TYPE_CHECKING:
    from .header import Header

__all__ = ["Repair", "check_image"]

#: What `check_image` may change: give leaked clusters back, or put everything right.
Repair = Literal["leaks", "all"]


async def check_image(
    storage: Storage,
    *,
    repair: Repair | None = None,
    progress: Progress | None = None,
) -> CheckResult:
    """Check the image in `storage`, and repair it if that is asked for.

    Nobody else may write to the image meanwhile. The image's backing file and its external data
    file are not looked at. A repair that is cancelled, or ended by a power cut, leaves an image
    that is no worse than it was; another repair finishes it.

    Args:
        storage: The image file; writable for a repair.
        repair: "leaks" gives back what takes room for nothing and loses nothing. "all" also puts
            right what is corrupt, and gives up data where nothing else is left: `lost` and `notes`
            of the result say which.
        progress: Told how far the walk over the L2 tables is; it begins anew for each walk.

    Returns:
        What is wrong, after the repair if there was one.

    Raises:
        FormatError: Not a qcow2 image, or its header is beyond repair.
        UnsupportedError: It needs something that imagofs does not offer.
        ReadOnlyError: A repair of a storage that is open read-only.
        StorageError: Something cannot be read or written.
    """
    if repair is not None:
        from .repair import repair_image

        return await repair_image(storage, repair, progress=progress)
    from .loading import read_header

    try:
        header = await read_header(storage)
    except FormatError as exc:
        from .repair_preview import check_with_mended_header

        return await check_with_mended_header(storage, exc, progress=progress)
    result = (await examine(storage, header, progress=progress)).result
    return replace(result, notes=_marks(header))


def _marks(header: Header) -> tuple[str, ...]:
    """Marks that a repair takes away, and that count for nothing."""
    notes: list[str] = []
    if header.dirty:
        notes.append(
            "the image is marked dirty: its refcounts may be out of date, and are rebuilt when it "
            "is opened for writing"
        )
    if header.corrupt:
        notes.append(
            "the image is marked corrupt, and is not opened for writing until --repair all has "
            "taken the mark away"
        )
    return tuple(notes)


@dataclass(frozen=True, slots=True)
class Examination:
    """A check with all that a repair needs to know.

    Attributes:
        scan: The walk, with everything counted, the refcount structure included.
        stored: The refcounts that the image has stored.
        sound: Whether the refcount structure is where it can be.
        result: What was found.
        report: The same, for those who count on.
    """

    scan: Scan
    stored: StoredCounts
    sound: bool
    result: CheckResult
    report: Report


async def examine(
    storage: Storage, header: Header, *, progress: Progress | None = None
) -> Examination:
    """Check an image whose header is known. Raises as `check_image`."""
    report = Report()
    clusters = storage.size() + header.cluster_size - 1 >> header.cluster_bits
    table = await read_table(
        storage, header.reftable_offset, header.reftable_clusters << header.cluster_bits - 3
    )
    stored = StoredCounts(header, clusters, table, flat=can_be_flat(storage, header))
    await stored.load(storage)
    scan = Scan(storage, header, report, stored=stored, progress=progress)
    await scan.run()
    sound = scan.mark_structure(table)
    end = _compare(scan, stored, report)
    # As qemu does, which counts the guest's disk in whole sectors.
    total = (header.size + 511 & ~511) + header.cluster_size - 1 >> header.cluster_bits
    result = CheckResult(
        filename=storage.filename,
        corruptions=report.corruptions,
        leaks=report.leaks,
        check_errors=report.check_errors,
        total_clusters=total,
        allocated_clusters=scan.allocated,
        fragmented_clusters=scan.fragmented,
        compressed_clusters=scan.compressed,
        image_end_offset=end << header.cluster_bits,
        findings=tuple(report.findings),
    )
    return Examination(scan, stored, sound, result, report)


def _compare(scan: Scan, stored: StoredCounts, report: Report) -> int:
    """Compare all refcounts.

    Returns:
        The number of the host cluster behind the last one in use.
    """
    counts = scan.counts
    _note_unreadable(stored, report)
    end = 1
    for start in sorted({*counts.starts(), *stored.starts()}):
        if stored.is_unreadable(start):
            continue
        wanted, found = counts.piece(start), stored.piece(start)
        if wanted != found:
            _compare_chunk(scan, report, start, wanted, found)
        end = max(end, start + _used(wanted), start + _used(found))
    for cluster, surplus in sorted(counts.overflow.items()):
        report.corruption(
            Kind.REFCOUNT,
            f"the host cluster at {cluster << scan.cluster_bits:#x} has "
            f"{counts.maximum + surplus} references, more than {counts.refcount_bits} bits count",
            times=surplus,
            host_offset=cluster << scan.cluster_bits,
        )
    for cluster, what in sorted(scan.overlaps.items()):
        wrong = stored.get(cluster) != counts.get(cluster)
        report.corruption(
            Kind.OVERLAP,
            f"{what} lies over {scan.own[cluster]} at {cluster << scan.cluster_bits:#x}",
            # If the refcount is wrong too, that counts already.
            times=0 if wrong else 1,
            host_offset=cluster << scan.cluster_bits,
        )
    return end


def _note_unreadable(stored: StoredCounts, report: Report) -> None:
    for index in sorted(stored.unreadable):
        first = index << stored.block_bits
        number = min(1 << stored.block_bits, stored.clusters - first)
        report.error(
            Kind.REFCOUNT,
            f"the refcounts of {number} host clusters from {first} on cannot be read",
            times=number,
        )


def _used(counts: array[int]) -> int:
    """Length of `counts` without the zeroes at its end."""
    length = len(counts.tobytes().rstrip(b"\0"))
    return -(-length // counts.itemsize)


def _compare_chunk(
    scan: Scan, report: Report, start: int, wanted: array[int], found: array[int]
) -> None:
    bits = scan.cluster_bits
    leaked_from = leaked = 0

    def leak_ends() -> None:
        if leaked:
            report.leak(
                f"{leaked} host cluster{'s' * (leaked > 1)} at "
                f"{leaked_from << bits:#x} leaked: the refcount is higher than the references",
                clusters=leaked,
                host_offset=leaked_from << bits,
            )

    for position, references, count in differences(wanted, found):
        cluster = start + position
        if count > references:
            if leaked_from + leaked != cluster:
                leak_ends()
                leaked_from, leaked = cluster, 0
            leaked += 1
        else:
            report.corruption(
                Kind.REFCOUNT,
                f"the host cluster at {cluster << bits:#x} has {references} "
                f"reference{'s' * (references > 1)}, its refcount is {count}",
                host_offset=cluster << bits,
            )
    leak_ends()
