"""What a guest did to a disk and when, and so what each of its sectors may hold after a power cut.

Every sector that is written holds its own place and the number of the operation, so that a sector
of another place, an older version or a mix of two is told apart from what belongs there.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio
import trio.testing

T = TypeVar("T")

SECTOR = 512
ZEROES = bytes(SECTOR)
_TAG = struct.Struct(">8sQQ")


def run_repeatably(function: Callable[..., Awaitable[T]], *arguments: object, seed: int) -> T:
    """`trio.run` on a clock that never waits, with tasks that take turns as `seed` says."""
    scheduler: Any = trio._core._run
    before = scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)
    try:
        clock = trio.testing.MockClock(autojump_threshold=0)
        return trio.run(function, *arguments, clock=clock)
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = before


def tagged(sector: int, sequence: int) -> bytes:
    """The contents of guest sector `sector` as operation `sequence` writes it."""
    return (_TAG.pack(b"imagofs!", sector, sequence) * (SECTOR // _TAG.size + 1))[:SECTOR]


def tagged_range(first: int, count: int, sequence: int) -> bytes:
    """`tagged` for `count` sectors from `first` on."""
    return b"".join(tagged(sector, sequence) for sector in range(first, first + count))


def describe(contents: bytes) -> str:
    """A sector in words."""
    if contents == ZEROES:
        return "zeroes"
    magic, sector, sequence = _TAG.unpack_from(contents)
    if magic == b"imagofs!" and contents == tagged(sector, sequence):
        return f"guest sector {sector} of operation {sequence}"
    return f"{contents[:24].hex()}..."


@dataclass(slots=True, eq=False)
class Operation:
    """One change of some sectors.

    Attributes:
        values: The new contents by sector.
        began: When it was asked for.
        over: When it returned, in whatever way; None while it runs.
        done: Whether it succeeded.
        certain: Whether its success means that the sectors have the new contents; a discard to
            anything may also leave them as they were.
        seen: By sector, when a read first ended that found the new contents.
    """

    values: dict[int, bytes]
    began: int
    certain: bool = True
    over: int | None = None
    done: bool = False
    seen: dict[int, int] = field(default_factory=dict)

    def is_past(self, sector: int, at: int) -> bool:
        """Whether what was in the sector before is surely gone at the time `at`."""
        if self.seen.get(sector, at) < at:
            return True
        return self.certain and self.done and self.over is not None and self.over < at


@dataclass(slots=True)
class Sync:
    """A sync that succeeded: when it was asked for, and when it returned."""

    began: int
    ended: int


@dataclass(slots=True)
class History:
    """All operations and syncs, on one clock.

    Attributes:
        initial: The disk's contents before; they are durable.
        clock: Gives the time.
    """

    initial: bytes
    clock: Iterator[int]
    operations: list[Operation] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)

    def begin(self, values: dict[int, bytes], *, certain: bool = True) -> Operation:
        """Note that an operation begins."""
        operation = Operation(values, next(self.clock), certain)
        self.operations.append(operation)
        return operation

    def end(self, operation: Operation, *, done: bool) -> None:
        """Note that it returned."""
        operation.over, operation.done = next(self.clock), done

    def initial_sector(self, sector: int) -> bytes:
        """A sector as it was in the beginning."""
        return self.initial[sector * SECTOR : (sector + 1) * SECTOR]

    def allowed(self, at: float = float("inf"), *, powered: bool = False) -> list[set[bytes]]:
        """What each sector may hold, by sector.

        Args:
            at: When the power was cut, or when the disk is read.
            powered: There was no power cut: what an operation did is there without a sync.
        """
        covered_until = max((sync.began for sync in self.syncs if sync.ended < at), default=-1)
        newest: dict[int, int] = {}  # the beginning of the latest operation that is surely there
        touching: dict[int, list[Operation]] = {}
        for operation in self.operations:
            if operation.began >= at:
                continue
            surely = (
                operation.certain
                and operation.done
                and operation.over is not None
                and operation.over < (at if powered else covered_until)
            )
            for sector in operation.values:
                touching.setdefault(sector, []).append(operation)
                if surely:
                    newest[sector] = max(newest.get(sector, -1), operation.began)
        result = []
        for sector in range(-(-len(self.initial) // SECTOR)):
            limit = newest.get(sector)
            values = {self.initial_sector(sector)} if limit is None else set()
            for operation in touching.get(sector, ()):
                if limit is None or operation.over is None or operation.over >= limit:
                    values.add(operation.values[sector])
            result.append(values)
        return result

    def note_read(
        self, first: int, contents: bytes | bytearray, began: int, *, atomic: bool = True
    ) -> None:
        """See that a read found in each sector what a disk may show there, and remember it.

        A sector may show any operation that was not followed by another one that was over (or was
        already seen) before the read began.

        Args:
            first: The first sector.
            contents: What was read, just now.
            began: When the read began.
            atomic: Once a read has found the new contents, no later one may find the old ones.
                Where new contents are written to the place of the old ones before they are mapped
                (in a data file, in zeroes that keep their host space), a slow read may find them
                earlier than a fast one that comes after it.

        Raises:
            AssertionError: It found something else.
        """
        ended = next(self.clock)
        for number in range(len(contents) // SECTOR):
            sector = first + number
            found = bytes(contents[number * SECTOR : (number + 1) * SECTOR])
            operations = [op for op in self.operations if sector in op.values]
            limit = max((op.began for op in operations if op.is_past(sector, began)), default=-1)
            shown = [
                op
                for op in operations
                if op.values[sector] == found and (op.over is None or op.over >= limit)
            ]
            may_be_initial = limit < 0 and found == self.initial_sector(sector)
            if not shown and not may_be_initial:
                raise AssertionError(
                    f"a read from {began} to {ended} found {describe(found)} in sector {sector}; "
                    + ", ".join(
                        f"{describe(op.values[sector])} from {op.began} to {op.over}"
                        for op in operations
                    )
                )
            if atomic and len(shown) == 1 and not may_be_initial:
                shown[0].seen.setdefault(sector, ended)
