"""Jobs: compressed clusters that are read and inflated together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import trio

from .entries import CompressedRange

__all__ = ["InflateJob", "Piece"]

_READ_GAP = 4096  # compressed ranges this near to each other are read together


class Piece(NamedTuple):
    """One compressed cluster.

    Attributes:
        cluster: Its number in the guest.
        place: Where its data is, not past the file's end.
    """

    cluster: int
    place: CompressedRange


class InflateJob:
    """Some clusters, from the lookup of where they are to their contents.

    Args:
        pieces: The clusters, in the guest's order.
        wanted: Somebody has asked for them; otherwise they are inflated ahead.
        take_buffer: Returns memory of at least so many bytes for what is read.

    Attributes:
        pieces: As given.
        buffer: The memory for what is read.
        reads: The storage reads that fill it: views of it and host offsets.
        results: What is done: inflated clusters, or why they could not be inflated. The thread
            enters each as soon as it is there.
        error: Why nothing could be read.
        wanted: Clusters that somebody has asked for.
        done: Set when no more will come.
        reading: Ends the task that reads for the job.
    """

    __slots__ = (
        "_frames",
        "buffer",
        "done",
        "error",
        "pieces",
        "reading",
        "reads",
        "results",
        "wanted",
    )

    def __init__(
        self, pieces: list[Piece], *, wanted: bool, take_buffer: Callable[[int], bytearray]
    ) -> None:
        self.pieces = pieces
        self.results: dict[int, bytes | Exception] = {}
        self.error: Exception | None = None
        self.wanted = {piece.cluster for piece in pieces} if wanted else set()
        self.done = trio.Event()
        self.reading = trio.CancelScope()

        spans: list[list[int]] = []  # of the file: start, end
        span_of: list[int] = []
        for _, (host_offset, length) in pieces:
            end = host_offset + length
            if spans and spans[-1][0] <= host_offset <= spans[-1][1] + _READ_GAP:
                spans[-1][1] = max(spans[-1][1], end)
            else:
                spans.append([host_offset, end])
            span_of.append(len(spans) - 1)
        self.buffer = take_buffer(sum(end - start for start, end in spans))
        view = memoryview(self.buffer)
        self.reads: list[tuple[memoryview, int]] = []
        position = 0
        for start, end in spans:
            self.reads.append((view[position : position + end - start], start))
            position += end - start
        self._frames: list[tuple[int, memoryview]] = []
        for number, (cluster, (host_offset, length)) in zip(span_of, pieces, strict=True):
            data, start = self.reads[number]
            at = host_offset - start
            self._frames.append((cluster, data[at : at + length]))

    def inflate(self, inflate: Callable[[memoryview, int], bytes], cluster_size: int) -> None:
        """Fill `results`. For a thread; never raises. The buffer is free afterwards."""
        for cluster, frame in self._frames:
            try:
                self.results[cluster] = inflate(frame, cluster_size)
            except Exception as error:  # it is raised again where somebody asked for it
                self.results[cluster] = error
        self._frames.clear()
        self.reads.clear()
