"""Memory for requests and replies, and what the channel counts."""

from __future__ import annotations

from mmap import PAGESIZE, mmap

from .statistics import Latencies

__all__ = ["BufferPool", "ChannelStatistics", "MessageBuffer"]

_SLICES = 512


class MessageBuffer:
    """Memory for one message, laid out so that its data begin at a page boundary.

    Args:
        head: Bytes of headers before the data.
        size: Bytes of the whole message.
    """

    __slots__ = ("head", "slices", "view")

    def __init__(self, head: int, size: int) -> None:
        # An anonymous map takes only the pages that were used, and goes back as a whole.
        self.head = head
        self.view = memoryview(mmap(-1, PAGESIZE + size))[PAGESIZE - head :][:size]
        #: By length of the data: the data, and the message up to their end. To slice anew would
        #: cost more than to look it up.
        self.slices: dict[int, tuple[memoryview, memoryview]] = {}

    def slice(self, length: int) -> tuple[memoryview, memoryview]:
        """The first `length` bytes of data, and the message up to their end."""
        pair = self.slices.get(length)
        if pair is None:
            end = self.head + length
            pair = self.view[self.head : end], self.view[:end]
            if len(self.slices) < _SLICES:
                self.slices[length] = pair
        return pair


class BufferPool:
    """Buffers of one kind, a few of which are kept for the next one who needs one.

    Args:
        head: As for `MessageBuffer`.
        size: Likewise.
        keep: How many are kept.
    """

    def __init__(self, head: int, size: int, keep: int) -> None:
        self._head = head
        self._size = size
        self._keep = keep
        self._spare: list[MessageBuffer] = []

    def take(self) -> MessageBuffer:
        """A buffer; what is in it is undefined."""
        return self._spare.pop() if self._spare else MessageBuffer(self._head, self._size)

    def give_back(self, buffer: MessageBuffer) -> None:
        """Return a buffer that nobody looks at any more."""
        if len(self._spare) < self._keep:
            self._spare.append(buffer)


class ChannelStatistics:
    """What the channel counts: plain integers, read at any time.

    Attributes:
        reads: READs that were answered.
        read_bytes: Bytes of them.
        slow_reads: READs among them that had to wait for the image.
        writes: WRITEs that were answered.
        write_bytes: Bytes of them.
        slow_writes: WRITEs among them that had to wait for the image.
        others: Other requests that the channel answered.
        forwarded: Requests that pyfuse3 answered.
        deepest: The most requests that ever waited at the same time.
        latencies: How long READs, WRITEs and the others that the channel answered took, without
            the moment that a small reply may be held back: 0.1 ms, and while the request that then
            is being answered takes.
    """

    __slots__ = (
        "deepest",
        "forwarded",
        "latencies",
        "others",
        "read_bytes",
        "reads",
        "slow_reads",
        "slow_writes",
        "write_bytes",
        "writes",
    )

    def __init__(self) -> None:
        self.reads = self.read_bytes = self.slow_reads = 0
        self.writes = self.write_bytes = self.slow_writes = 0
        self.others = self.forwarded = self.deepest = 0
        self.latencies = Latencies()
