"""Locks on ranges of bytes, for tasks of one trio run.

`RangeLocks` keeps overlapping ranges apart: one holder at a time for each byte. `WriteBlockers` is
the pair that a storage needs around unaligned writes: *weak* blockers (plain writes) overlap each
other, a *strong* one (a read-modify-write cycle) excludes every other blocker of its range.

Rules:

- Whoever asks is queued at once, behind everybody who asked before, and waits only for those of
  them whose ranges overlap its own. So nobody starves, and no two wait for each other.
- Registering, granting and releasing are plain functions; the only await is the wait for the grant,
  and whatever ends it (a cancellation too) takes the entry out of the queue.
- A task that holds a range and asks for an overlapping one waits for itself, forever.
"""

from __future__ import annotations

import trio

from ..errors import OutOfRangeError

__all__ = ["RangeHold", "RangeLocks", "WriteBlockers"]


class RangeHold:
    """One range in the queue of a `RangeLocks`: ``async with`` waits for it, holds and frees it.

    Entering does not yield if nothing overlaps. A cancelled entry leaves nothing behind. It can be
    entered again after it was left.
    """

    __slots__ = ("_event", "_locks", "_obstacles", "_shared", "_ticket", "end", "start")

    def __init__(self, locks: RangeLocks, start: int, end: int, shared: bool) -> None:
        if not 0 <= start <= end:
            raise OutOfRangeError(f"cannot lock the range from {start} to {end}")
        #: First byte of the range.
        self.start = start
        #: First byte behind the range.
        self.end = end
        self._locks = locks
        self._shared = shared
        self._ticket = 0
        self._obstacles = 0  # earlier entries that must go first
        self._event: trio.Event | None = None

    def enter_nowait(self) -> bool:
        """Hold the range if nothing overlaps it; else change nothing and return False.

        Every success needs one `release`.
        """
        locks = self._locks
        if locks.entries and locks._obstacles_of(self):
            return False
        locks._enqueue(self)
        return True

    def release(self) -> None:
        """Leave the queue, and let those go on that waited only for this entry."""
        self._locks._dequeue(self)

    async def __aenter__(self) -> RangeHold:
        locks = self._locks
        obstacles = locks._obstacles_of(self) if locks.entries else 0
        locks._enqueue(self)
        if obstacles:
            self._obstacles = obstacles
            self._event = trio.Event()
            try:
                await self._event.wait()
            except BaseException:
                locks._dequeue(self)
                raise
            finally:
                self._event = None
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._locks._dequeue(self)


class RangeLocks:
    """Exclusive locks on ranges of bytes.

    Attributes:
        entries: Everybody who holds or waits, in the order of their requests. Empty (false) when
            nothing is held, which a fast path may test by itself; treat it as read-only.
    """

    __slots__ = ("_tickets", "entries")

    def __init__(self) -> None:
        self.entries: dict[RangeHold, None] = {}
        self._tickets = 0

    def hold(self, start: int, end: int) -> RangeHold:
        """The lock on the bytes from `start` up to, not including, `end`.

        Nothing is registered before it is entered. An empty range conflicts with nothing.

        Raises:
            OutOfRangeError: Not 0 <= start <= end.
        """
        return RangeHold(self, start, end, False)

    def is_free(self, start: int, end: int) -> bool:
        """Whether nobody holds or waits for a part of the range. A plain, cheap function."""
        if not self.entries:
            return True
        for other in self.entries:
            if other.start < end and start < other.end:
                return start >= end
        return True

    def _obstacles_of(self, entry: RangeHold) -> int:
        """How many in the queue must go before `entry`, which is not in it yet."""
        start, end, shared = entry.start, entry.end, entry._shared
        if start == end:
            return 0
        obstacles = 0
        for other in self.entries:
            if other.start < end and start < other.end and not (shared and other._shared):
                obstacles += 1
        return obstacles

    def _enqueue(self, entry: RangeHold) -> None:
        if entry in self.entries:
            raise RuntimeError(f"the range from {entry.start} to {entry.end} is entered twice")
        if entry.start < entry.end:
            self._tickets = entry._ticket = self._tickets + 1
            self.entries[entry] = None

    def _dequeue(self, entry: RangeHold) -> None:
        if entry.start == entry.end:
            return
        del self.entries[entry]
        entry._obstacles = 0
        start, end, shared, ticket = entry.start, entry.end, entry._shared, entry._ticket
        for other in self.entries:
            if (
                other._obstacles
                and other._ticket > ticket
                and other.start < end
                and start < other.end
                and not (shared and other._shared)
            ):
                other._obstacles -= 1
                if not other._obstacles and other._event is not None:
                    other._event.set()


class WriteBlockers:
    """Weak and strong blockers of writes to ranges of a storage."""

    __slots__ = ("locks",)

    def __init__(self) -> None:
        #: The queue of both kinds.
        self.locks = RangeLocks()

    def weak(self, start: int, end: int) -> RangeHold:
        """For a plain write: waits for strong blockers of the range, and keeps new ones off."""
        return RangeHold(self.locks, start, end, True)

    def strong(self, start: int, end: int) -> RangeHold:
        """For a read-modify-write: waits for every blocker of the range, keeps new ones off."""
        return RangeHold(self.locks, start, end, False)
