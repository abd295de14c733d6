"""Deflated grains: read together, inflated in threads, kept for a while, inflated ahead.

A *job* is up to 512 KiB of grains that one thread inflates in one go. Their bytes are read before
it begins, so it never waits, and belongs to no task: a reader that is cancelled strands nobody.
Grains are inflated ahead of sequential reads if their bytes can be had without waiting.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import trio

from ...errors import CorruptImageError
from ...inflating import Inflated, InflatedCache
from ...sequential import SequentialReads
from ...storage.base import Storage
from .descriptor import SECTOR
from .sparse import MARKER_BYTES, inflate_grain, parse_grain_marker

__all__ = ["DeflatedGrains"]

_JOB_BYTES = 512 << 10  # inflated by one thread in one go
_SEGMENT_BYTES = 1 << 20  # of a long read that are waited for together
_AHEAD_BYTES = 2 << 20  # inflated ahead of one sequential reader


class _Job:
    """Grains that are inflated together.

    Attributes:
        places: Host offsets by grain number.
        ahead: Nobody had asked for them when it began.
        awaited: Somebody waits for it now.
        frames: The bytes of each grain from its host offset on, as many as there may be of it.
        results: Each grain, or why there is none.
        done: Set when the results are complete.
    """

    __slots__ = ("ahead", "awaited", "done", "frames", "places", "results")

    def __init__(self, places: dict[int, int], *, ahead: bool) -> None:
        self.places = places
        self.ahead = ahead
        self.awaited = not ahead
        self.frames: dict[int, memoryview] = {}
        self.results: dict[int, bytes | Exception] = {}
        self.done = trio.Event()


class DeflatedGrains:
    """The grains of one extent, by number.

    Args:
        storage: The extent's file.
        inflated: Where inflated grains are kept; shared by the chain.
        grain_bytes: Bytes of a grain.
        length: Bytes of the extent, which may end within its last grain.
        start: Guest offset of the extent.
        markers: Grains stand behind a marker.
        place_nowait: Returns a grain's host offset, None if it is not deflated or its table is not
            in memory.
        place: Returns it, with the table loaded if need be; raises if it is not deflated.
    """

    def __init__(
        self,
        storage: Storage,
        inflated: InflatedCache,
        *,
        grain_bytes: int,
        length: int,
        start: int,
        markers: bool,
        place_nowait: Callable[[int], int | None],
        place: Callable[[int], Awaitable[int]],
    ) -> None:
        self._storage = storage
        self._cache = inflated
        self._namespace = inflated.namespace()
        self._grain_bytes = grain_bytes
        self._length = length
        self._start = start
        self._markers = markers
        self._place_nowait = place_nowait
        self._place = place
        # Deflated data that is longer than twice the grain is nonsense, and so refused by others.
        self._longest = MARKER_BYTES + 2 * grain_bytes
        self._inflight: dict[int, _Job] = {}
        self.forget()

    def forget(self) -> None:
        """Forget every grain: what is being inflated now does not enter the cache."""
        self._inflight.clear()
        self._cache.drop_range(self._namespace, self._length // self._grain_bytes + 1)
        self._sequence = SequentialReads(
            _AHEAD_BYTES // self._grain_bytes, self._cache.ahead_limit // 2 // self._grain_bytes
        )

    # --- reading --------------------------------------------------------------------------------

    def read_nowait(self, view: memoryview, position: int) -> bool:
        """Fill `view` from byte `position` of the extent if the grains are in memory."""
        first, within = divmod(position, self._grain_bytes)
        grains = []
        for number in range(first, self._end_number(position, view.nbytes)):
            grain = self._take(number)
            if grain is None:
                return False
            grains.append(grain)
        _copy(grains, within, view)
        return True

    async def read(self, view: memoryview, position: int) -> None:
        """Fill `view` from byte `position` of the extent.

        A read that is cancelled leaves undefined contents in `view`, and nothing else.

        Raises:
            CorruptImageError: A grain is damaged, or is not what its table entry says.
            StorageError: The file cannot be read.
        """
        while view.nbytes:
            # Cut at grains, so that none is needed for two segments.
            most = max(_SEGMENT_BYTES, self._grain_bytes) - position % self._grain_bytes
            segment, view = view[:most], view[most:]
            first, within = divmod(position, self._grain_bytes)
            grains = await self._inflated(first, self._end_number(position, segment.nbytes))
            _copy(grains, within, segment)
            position += segment.nbytes

    def _end_number(self, position: int, length: int) -> int:
        return -(-(position + length) // self._grain_bytes)

    def _take(self, number: int) -> Inflated | None:
        """The grain if it is in memory. Unless it was read before, more is inflated ahead."""
        key = self._namespace + number
        was_used = key in self._cache.young
        grain = self._cache.get(key)
        if grain is not None and not was_used:
            self._read_ahead(number, 1, missed=False)
        return grain

    async def _inflated(self, first: int, end: int) -> list[Inflated]:
        """The grains from `first` to before `end`."""
        found: dict[int, Inflated] = {}
        jobs: dict[_Job, None] = {}
        missing: list[int] = []
        for number in range(first, end):
            grain = self._take(number)
            if grain is not None:
                found[number] = grain
            elif (job := self._inflight.get(number)) is not None:
                jobs[job] = None
            else:
                missing.append(number)
        per_job = max(_JOB_BYTES // self._grain_bytes, 1)
        for at in range(0, len(missing), per_job):
            jobs[await self._begin(missing[at : at + per_job])] = None
        if jobs:
            self._read_ahead(first, end - first, missed=bool(missing))
        for job in jobs:
            job.awaited = True
        self._cache.threads.settle()
        for job in jobs:
            await job.done.wait()
            for number, result in job.results.items():
                if isinstance(result, bytes):
                    found[number] = result
                elif first <= number < end:
                    raise self._error(job, number, result)
        return [found[number] for number in range(first, end)]

    def _error(self, job: _Job, number: int, error: Exception) -> Exception:
        """What is raised for a result that is an error; each reader gets an error of its own."""
        if not isinstance(error, CorruptImageError):
            return error
        return CorruptImageError(
            f"the grain of guest offset {self._start + number * self._grain_bytes} at host offset "
            f"{job.places[number]}: {error.message}",
            filename=self._storage.filename,
        )

    # --- jobs -----------------------------------------------------------------------------------

    async def _begin(self, numbers: Iterable[int]) -> _Job:
        """Read what there is of some grains, and begin to inflate them."""
        job = _Job({number: await self._place(number) for number in numbers}, ahead=False)
        for view, host_offset in self._lay_out(job):
            if self._storage.readv_nowait((view,), host_offset) != view.nbytes:
                await self._storage.readv((view,), host_offset)
        self._submit(job)
        return job

    def _read_ahead(self, first: int, count: int, *, missed: bool) -> None:
        """Note what is being read, and begin to inflate what is likely to be read next."""
        ahead = self._sequence.touch(first, count, missed=missed)
        if ahead is None:
            return
        kept = self._cache.kept(range(self._namespace + ahead.start, self._namespace + ahead.stop))
        places = {}
        for number in ahead:
            known = number in self._inflight or self._namespace + number in kept
            if not known and number * self._grain_bytes < self._length:
                place = self._place_nowait(number)
                if place is not None:
                    places[number] = place
        numbers = list(places)
        per_job = max(_JOB_BYTES // self._grain_bytes, 1)
        for at in range(0, len(numbers), per_job):
            job = _Job({n: places[n] for n in numbers[at : at + per_job]}, ahead=True)
            if all(
                self._storage.readv_nowait((view,), host_offset) == view.nbytes
                for view, host_offset in self._lay_out(job)
            ):
                self._submit(job)

    def _lay_out(self, job: _Job) -> list[tuple[memoryview, int]]:
        """Make the frames of `job`; return the reads that fill them.

        How long a grain's data is stands in its marker only. So each frame is as long as it may
        be, and grains that lie one behind the other, as they mostly do, share one read.
        """
        size = self._storage.size()
        spans: list[tuple[int, int, list[int]]] = []
        for number, start in sorted(job.places.items(), key=lambda item: item[1]):
            end = min(start + self._longest, size)
            if spans and start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(end, spans[-1][1]), [*spans[-1][2], number])
            else:
                spans.append((start, end, [number]))
        reads = []
        for start, end, numbers in spans:
            view = memoryview(bytearray(max(end - start, 0)))
            reads.append((view, start))
            for number in numbers:
                at = job.places[number] - start
                job.frames[number] = view[at : at + self._longest]
        return reads

    def _submit(self, job: _Job) -> None:
        for number in job.places:
            self._inflight[number] = job

        def work() -> None:
            for number, frame in job.frames.items():
                try:
                    job.results[number] = self._inflate(number, frame)
                except Exception as error:  # it is raised again where somebody asked for it
                    job.results[number] = error

        self._cache.threads.submit(work, lambda: self._finish(job), lambda: job.awaited)

    def _finish(self, job: _Job) -> None:
        """Put what a job inflated into the cache, and wake who waits for it. A plain function."""
        ready: dict[int, Inflated] = {}
        for number, result in job.results.items():
            if self._inflight.get(number) is not job:
                continue  # forgotten meanwhile, or another job has it too
            del self._inflight[number]
            if isinstance(result, bytes):
                ready[self._namespace + number] = result
        self._cache.put_inflated(ready, ahead=job.ahead)
        job.frames = {}
        job.done.set()

    # --- one grain, in a thread -----------------------------------------------------------------

    def _inflate(self, number: int, frame: memoryview) -> bytes:
        """Inflate a grain; runs in a worker thread and touches nothing that changes."""
        if self._markers:
            frame = self._behind_marker(number, frame)
        left = self._length - number * self._grain_bytes
        return inflate_grain(frame, self._grain_bytes, min(self._grain_bytes, left))

    def _behind_marker(self, number: int, frame: memoryview) -> memoryview:
        if frame.nbytes < MARKER_BYTES:
            raise CorruptImageError("its marker is cut off")
        marker = parse_grain_marker(frame)
        sector = number * (self._grain_bytes // SECTOR)
        # Sectors of the disk are meant; writers of split disks may count the extent's.
        if marker.first_sector not in (self._start // SECTOR + sector, sector):
            raise CorruptImageError(f"its marker names sector {marker.first_sector}")
        end = MARKER_BYTES + marker.deflated_length
        if not MARKER_BYTES < end <= frame.nbytes:
            raise CorruptImageError(
                f"its marker says that it has {marker.deflated_length} deflated bytes"
            )
        return frame[MARKER_BYTES:end]


def _copy(grains: list[Inflated], within: int, view: memoryview) -> None:
    """Fill `view` from consecutive grains, from byte `within` of the first one on."""
    position = 0
    for grain in grains:
        part = memoryview(grain)[within : within + view.nbytes - position]
        view[position : position + part.nbytes] = part
        position += part.nbytes
        within = 0
