"""I/O in flight, so that host clusters are not reused under a read that looked them up."""

from __future__ import annotations

import trio

__all__ = ["IoEpochs"]


class IoEpochs:
    """Counts I/O by the epoch in which it began."""

    def __init__(self) -> None:
        self._epoch = 0
        self._active: dict[int, int] = {}
        self._ended: trio.Event | None = None

    def begin(self) -> int:
        """Note that I/O begins; return its token."""
        epoch = self._epoch
        self._active[epoch] = self._active.get(epoch, 0) + 1
        return epoch

    def end(self, token: int) -> None:
        """Note that the I/O of `token` has ended."""
        left = self._active[token] - 1
        if left:
            self._active[token] = left
        else:
            del self._active[token]
            if self._ended is not None:
                self._ended.set()

    async def wait_for_earlier(self) -> None:
        """Return when all I/O that has begun by now has ended. Later I/O is not waited for."""
        limit = self._epoch
        self._epoch += 1
        while any(epoch <= limit for epoch in self._active):
            if self._ended is None or self._ended.is_set():
                self._ended = trio.Event()
            await self._ended.wait()
