"""Sequential reads: noticed, and told what to make ready ahead of them. No I/O."""

from __future__ import annotations

__all__ = ["SequentialReads"]

_STREAMS = 16  # sequential readers that are told apart
_REMEMBERED = 64  # reads of which it is remembered where they ended


class _Stream:
    """One sequential reader.

    Attributes:
        position: The cluster that it will ask for next.
        end: What lies before it is ready, or is being made ready.
        window: Clusters to be ahead.
        seen_at: How many clusters had been told for all streams when it was last seen.
    """

    __slots__ = ("end", "position", "seen_at", "window")

    def __init__(self, position: int, window: int) -> None:
        self.position = self.end = position
        self.window = window
        self.seen_at = 0


class SequentialReads:
    """Notices sequential reads, and says what to make ready ahead of them.

    The second read that continues another begins a stream. How far ahead of it things are made
    ready doubles with each step up to `most`, so that a short run costs little. A reader that asks
    for its pieces out of order, within the window, is still one stream. One that was not seen while
    the others were told more than there is room for has ended: it takes no share any more.

    Args:
        most: Clusters ahead of one stream.
        most_together: Clusters ahead of all streams together.
    """

    def __init__(self, most: int, most_together: int) -> None:
        self._most = most
        self._most_together = most_together
        self._streams: list[_Stream] = []  # that was seen last is the last
        self._told = 0
        self._ends: dict[int, None] = {}

    def touch(self, first: int, count: int, *, missed: bool) -> range | None:
        """Note a read of clusters that nobody has read before, as far as is remembered.

        Args:
            first: The first cluster.
            count: How many.
            missed: They were neither ready nor being made ready.

        Returns:
            Clusters to be made ready now, if any.
        """
        last = first + count
        stream = self._find(first)
        if stream is None:
            if first not in self._ends:
                self._remember(last)
                return None
            del self._ends[first]
            stream = _Stream(last, count)
            self._streams.append(stream)
            if len(self._streams) > _STREAMS:
                del self._streams[0]
        elif missed and stream.position <= first < stream.end:
            # It was made ready and displaced, or could not be: too much is going on at once.
            stream.window = max(1, stream.window // 4)
            stream.end = last
        stream.position = max(stream.position, last)
        stream.seen_at = self._told
        while self._told - self._streams[0].seen_at > self._most_together:
            del self._streams[0]
        most = max(1, min(self._most, self._most_together // len(self._streams)))
        if stream.end - stream.position > stream.window * 3 // 4:
            return None
        stream.window = min(2 * stream.window, most)
        start = max(stream.end, stream.position)
        stream.end = max(start, stream.position + stream.window)
        self._told += stream.end - start
        return range(start, stream.end) if start < stream.end else None

    def _remember(self, end: int) -> None:
        self._ends[end] = None
        if len(self._ends) > _REMEMBERED:
            del self._ends[next(iter(self._ends))]

    def _find(self, first: int) -> _Stream | None:
        for index, stream in enumerate(self._streams):
            if stream.position - stream.window <= first <= stream.end:
                self._streams.append(self._streams.pop(index))
                return stream
        return None
