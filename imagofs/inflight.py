"""What is in flight, so that a close can wait for it."""

from __future__ import annotations

import trio

__all__ = ["InFlight"]


class InFlight:
    """``with in_flight:`` around each operation; `ended` waits until none is left."""

    __slots__ = ("_count", "_ended")

    def __init__(self) -> None:
        self._count = 0
        self._ended: trio.Event | None = None

    def __enter__(self) -> None:
        self._count += 1

    def __exit__(self, *exc_info: object) -> None:
        self._count -= 1
        if not self._count and self._ended is not None:
            self._ended.set()
            self._ended = None

    async def ended(self) -> None:
        """Wait until nothing is in flight. Does not yield if nothing is."""
        while self._count:
            if self._ended is None:
                self._ended = trio.Event()
            await self._ended.wait()
