"""Jobs: compressed clusters that are read and inflated together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import trio

from ...inflating import Inflated
from .entries import CompressedRange

__all__ = ["InflateJob"]

_READ_GAP = 4096  # compressed ranges this near to each other are read together


class InflateJob:
    """Some clusters, from the lookup of where they are to their contents.

    Args:
        places: Where the data of which guest cluster is, in the guest's order; not past the file's
            end.
        ahead: Nobody has asked for them yet.
        io_token: What `begin_io` returned for it.

    Attributes:
        places: As given.
        ahead: As given.
        io_token: As given.
        buffer: The memory for what is read; None: `read_nowait` was not called yet.
        missing: The storage reads that remain to be done: views of `buffer` and host offsets.
        results: What is done: inflated clusters, or why they could not be inflated. The thread
            enters each as soon as it is there.
        error: Why nothing could be read.
        done: Set when no more will come.
        reading: Ends the task that reads for the job.
        awaited: Somebody waits for `done`.
    """

    __slots__ = (
        "_frames",
        "ahead",
        "awaited",
        "buffer",
        "done",
        "error",
        "io_token",
        "missing",
        "places",
        "reading",
        "results",
    )

    def __init__(
        self, places: Mapping[int, CompressedRange], *, ahead: bool, io_token: int
    ) -> None:
        self.places = places
        self.ahead = ahead
        self.io_token = io_token
        self.buffer: bytearray | None = None
        self.missing: list[tuple[memoryview, int]] = []
        self.results: dict[int, Inflated | Exception] = {}
        self.error: Exception | None = None
        self.done = trio.Event()
        self.reading = trio.CancelScope()
        self.awaited = not ahead
        self._frames: list[memoryview] = []

    def read_nowait(
        self,
        readv_nowait: Callable[[Sequence[memoryview], int], int],
        take_buffer: Callable[[int], bytearray],
    ) -> None:
        """Read what can be had without waiting; the rest is `missing`. A plain function.

        Args:
            readv_nowait: The storage's.
            take_buffer: Returns memory of at least so many bytes.
        """
        spans: list[list[int]] = []  # of the file: start, end
        span_of: list[int] = []
        for host_offset, length in self.places.values():
            end = host_offset + length
            if spans and spans[-1][0] <= host_offset <= spans[-1][1] + _READ_GAP:
                spans[-1][1] = max(spans[-1][1], end)
            else:
                spans.append([host_offset, end])
            span_of.append(len(spans) - 1)
        self.buffer = take_buffer(sum(end - start for start, end in spans))
        view = memoryview(self.buffer)
        reads: list[tuple[memoryview, int]] = []
        position = 0
        for start, end in spans:
            reads.append((view[position : position + end - start], start))
            position += end - start
        for number, (host_offset, length) in zip(span_of, self.places.values(), strict=True):
            data, start = reads[number]
            at = host_offset - start
            self._frames.append(data[at : at + length])
        self.missing = [
            (data, start) for data, start in reads if readv_nowait((data,), start) != data.nbytes
        ]

    def inflate(
        self,
        inflate: Callable[[memoryview, int], bytes],
        inflate_many: Callable[[list[memoryview], int], list[memoryview]] | None,
        cluster_size: int,
    ) -> None:
        """Fill `results`. For a thread; never raises. The buffer is free afterwards."""
        frames = self._frames
        self._frames = []
        if inflate_many is not None:
            try:
                many = inflate_many(frames, cluster_size)
            except Exception:  # one by one tells which of them is broken
                many = []
            if many:
                self.results.update(zip(self.places, many, strict=True))
                return
        for cluster, frame in zip(self.places, frames, strict=True):
            try:
                self.results[cluster] = inflate(frame, cluster_size)
            except Exception as error:  # it is raised again where somebody asked for it
                self.results[cluster] = error
