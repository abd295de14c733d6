"""What a check found, and how it is counted."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["CheckResult", "Finding", "Kind", "LostRange", "Report"]

#: Findings that are kept word for word; all are counted.
MAX_FINDINGS = 10_000


class Kind(enum.Enum):
    """What is wrong, by what it takes to put it right."""

    REFCOUNT = "refcount"  #: a stored refcount is too low, or cannot be read
    LEAK = "leak"  #: a stored refcount is too high: space is wasted, nothing else
    COPIED = "copied"  #: a COPIED flag does not fit the refcount
    STRUCTURE = "refcount structure"  #: refcount table or blocks are where they cannot be
    ENTRY = "entry"  #: an L1 or L2 entry cannot be right
    OVERLAP = "overlap"  #: two things are in one host cluster that cannot share it
    SNAPSHOT = "snapshot"  #: the snapshot table, or a snapshot's L1 table
    BITMAP = "bitmap"  #: the bitmap directory, or a bitmap's table
    HEADER = "header"  #: a field of the header


#: A rebuild of the refcounts puts these right, and nothing is lost by it.
REBUILT = frozenset({Kind.REFCOUNT, Kind.LEAK, Kind.COPIED, Kind.STRUCTURE})


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: What sort of thing.
        message: One line about it.
        host_offset: Where in the image file, in bytes, if that is known.
        guest_offset: Which part of the disk it concerns, in bytes, if that is known.
    """

    kind: Kind
    message: str
    host_offset: int | None = None
    guest_offset: int | None = None


@dataclass(frozen=True, slots=True)
class LostRange:
    """A part of the disk whose contents a repair could not keep; it reads as zeroes now.

    Attributes:
        guest_offset: Where it begins, in bytes.
        length: Its length in bytes.
        snapshot: The name of the snapshot that lost it; None for the disk as it is now.
    """

    guest_offset: int
    length: int
    snapshot: str | None = None


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What is wrong with an image, after the repair if there was one.

    Attributes:
        filename: The image's file, if it has one.
        corruptions: What can lose data, or has.
        leaks: Host clusters that take room for nothing.
        check_errors: What could not be checked.
        total_clusters: Clusters of the guest's disk.
        allocated_clusters: Those of them that have a host cluster, or compressed data.
        fragmented_clusters: Those whose host cluster does not follow its predecessor's.
        compressed_clusters: Compressed ones.
        image_end_offset: Behind the last host cluster in use, in bytes.
        corruptions_fixed: Corruptions that the repair put right.
        leaks_fixed: Leaked clusters that the repair gave back.
        findings: What was found, in words: before the repair, if there was one. At most
            `MAX_FINDINGS` of them.
        lost: Parts of the disk that the repair could not keep.
        notes: What else the owner should know: marks on the image; what a repair did.
    """

    filename: str | None = None
    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    findings: tuple[Finding, ...] = ()
    lost: tuple[LostRange, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong (any more)."""
        return not (self.corruptions or self.leaks or self.check_errors)

    @property
    def exit_code(self) -> int:
        """As `qemu-img check` exits: 0 clean, 1 not wholly checked, 2 corruptions, 3 leaks."""
        if self.check_errors:
            return 1
        if self.corruptions:
            return 2
        return 3 if self.leaks else 0


class Report:
    """Collects findings and counts them."""

    __slots__ = ("check_errors", "corruptions", "findings", "kinds", "leaks")

    def __init__(self) -> None:
        self.corruptions = 0
        self.leaks = 0
        self.check_errors = 0
        self.findings: list[Finding] = []
        self.kinds: set[Kind] = set()

    def corruption(
        self,
        kind: Kind,
        message: str,
        *,
        times: int = 1,
        host_offset: int | None = None,
        guest_offset: int | None = None,
    ) -> None:
        """Note something wrong that counts `times` times."""
        self.corruptions += times
        self._add(Finding(kind, message, host_offset, guest_offset))

    def is_full(self) -> bool:
        """Whether no more findings are kept."""
        return len(self.findings) >= MAX_FINDINGS

    def count_corruption(self, kind: Kind, times: int) -> None:
        """Count something wrong without a word about it, for when no more findings are kept."""
        self.corruptions += times
        self.kinds.add(kind)

    def leak(self, message: str, *, clusters: int, host_offset: int | None = None) -> None:
        """Note leaked host clusters."""
        self.leaks += clusters
        self._add(Finding(Kind.LEAK, message, host_offset))

    def error(self, kind: Kind, message: str, *, times: int = 1) -> None:
        """Note something that cannot be checked."""
        self.check_errors += times
        self._add(Finding(kind, message))

    def _add(self, finding: Finding) -> None:
        self.kinds.add(finding.kind)
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)
