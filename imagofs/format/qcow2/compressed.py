"""Compressed clusters: read together, inflated in threads, kept for a while, inflated ahead.

The unit of work is a *job*: up to 1 MiB of clusters whose compressed bytes are read with as few
storage reads as possible (qemu packs them densely) and which one thread inflates in one go. A job
belongs to no task. Readers wait for it, and one that is cancelled strands nobody; what is inflated
ahead costs its reader nothing.

A job is in `_inflight` for each of its clusters until it ends. `forget` takes a cluster out of
there, so that what was inflated from an old mapping never enters the cache.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import trio

from ...errors import ClosedError, CorruptImageError, UnsupportedError
from ...inflating import (
    Inflated,
    InflatedCache,
    InflateError,
    inflate_deflate,
    inflate_zstd,
    inflate_zstd_clusters,
)
from ...sequential import SequentialReads
from ...vectors import copy_into, total_length
from .entries import CompressedRange, compressed_range
from .inflate_jobs import InflateJob

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ...storage.base import Storage

__all__ = ["CompressedClusters", "NotCompressed"]

# Largest cluster that is inflated in the caller's thread, in 40 (zstd) to 150 (deflate) us if it is
# prose: to hand it to a thread and back costs this thread 80, and the reader more than 200.
_INLINE_BYTES = 64 << 10
_MOST_BEGUN = 4096  # clusters of which it is remembered that only their beginning was inflated
# Inflated by one thread in one go, in half a millisecond (zstd) to one (deflate): the larger, the
# less often the threads need the interpreter's lock, and the longer who waits for the first part.
_DEFLATE_JOB_BYTES = 512 << 10
_ZSTD_JOB_BYTES = 1 << 20
_SEGMENT_BYTES = 1 << 20  # of a long read that are waited for together
_AHEAD_BYTES = 8 << 20  # inflated ahead of one sequential reader


class NotCompressed(Exception):
    """The cluster that is to be read is not compressed, or no longer: look its mapping up anew.

    Attributes:
        guest_offset: Where the cluster begins.
    """

    def __init__(self, guest_offset: int) -> None:
        super().__init__(f"the cluster at guest offset {guest_offset:#x} is not compressed")
        self.guest_offset = guest_offset


class CompressedClusters:
    """The compressed clusters of one image.

    Args:
        storage: The image file.
        cluster_bits: log2 of the cluster size in bytes.
        compression_type: 0 for deflate, 1 for zstd.
        cache: Where inflated clusters are kept; shared by the chain.
        filename: For error messages.
        descriptors_nowait: Returns the L2 entry (its 64 bits) of each of some guest clusters, or 0
            if it is not in memory or the cluster not compressed.
        descriptor: Returns that of one, loaded if need be, or 0 if it is not compressed.
        begin_io: Keeps host clusters from being reused until `end_io`; returns its token.
        end_io: See `begin_io`.
    """

    def __init__(
        self,
        storage: Storage,
        cluster_bits: int,
        compression_type: int,
        cache: InflatedCache,
        filename: str | None,
        *,
        descriptors_nowait: Callable[[range], list[int]],
        descriptor: Callable[[int], Awaitable[int]],
        begin_io: Callable[[], int],
        end_io: Callable[[int], None],
    ) -> None:
        self._storage = storage
        self._cluster_bits = cluster_bits
        self._cluster_size = 1 << cluster_bits
        self._inflate = inflate_zstd if compression_type else inflate_deflate
        # Of a cluster that nobody has read lately no more is inflated than up to what is read, if
        # that saves a quarter. A zstd frame this small is one block, with nothing to be saved.
        self._longest_start = 0 if compression_type else self._cluster_size * 3 // 4
        #: Clusters whose beginning was inflated lately, the oldest first.
        self._begun: dict[int, None] = {}
        self._most_begun = min(cache.limit >> cluster_bits, _MOST_BEGUN)
        self._inflate_many = inflate_zstd_clusters if compression_type else None
        job_bytes = _ZSTD_JOB_BYTES if compression_type else _DEFLATE_JOB_BYTES
        self._clusters_per_job = max(1, job_bytes >> cluster_bits)
        self._cache = cache
        self._namespace = cache.namespace()
        self._filename = filename
        self._descriptors_nowait = descriptors_nowait
        self._descriptor = descriptor
        self._begin_io = begin_io
        self._end_io = end_io
        # What was read stays for a while and takes room too: half of it.
        self._sequence = SequentialReads(
            _AHEAD_BYTES >> cluster_bits, cache.ahead_limit // 2 >> cluster_bits
        )
        self._inflight: dict[int, InflateJob] = {}
        self._jobs: set[InflateJob] = set()
        self._closed = False

    # --- reading ------------------------------------------------------------------------------

    def read_nowait(self, view: memoryview, guest_offset: int) -> bool:
        """Fill the flat `view` if all clusters of its range are inflated. A plain function.

        Returns:
            True: `view` is filled. False: ask `readv`; `view` is untouched.
        """
        cluster = guest_offset >> self._cluster_bits
        within = guest_offset & self._cluster_size - 1
        end = within + view.nbytes
        if end <= self._cluster_size:
            key = self._namespace + cluster
            data = self._cache.young.get(key) or self._cache.ahead.get(key)
            if data is None:
                data = self._take_one(cluster, end)
                if data is None:
                    return False
            elif end == self._cluster_size and key in self._cache.ahead:
                self._read_ahead(cluster, 1, missed=False)
            view[:] = data[within:end]
            return True
        parts = self.lend_nowait(guest_offset, view.nbytes)
        position = 0
        for part in parts or ():
            step = memoryview(part).nbytes
            view[position : position + step] = part
            position += step
        return bool(parts)

    def lend_nowait(self, guest_offset: int, length: int) -> list[Buffer]:
        """The range as it lies in memory; empty if a cluster is not inflated. A plain function."""
        first = guest_offset >> self._cluster_bits
        last = guest_offset + length - 1 >> self._cluster_bits
        keys = range(self._namespace + first, self._namespace + last + 1)
        ahead = [data for data in map(self._cache.ahead.get, keys) if data is not None]
        if len(ahead) == len(keys):  # as it mostly is for who reads on and on
            self._read_ahead(first, len(keys), missed=False)
            return self._cut(ahead, guest_offset, length)
        found: dict[int, Inflated] = {}
        if self._take(range(first, last + 1), found):
            return []
        return self._cut(found.values(), guest_offset, length)

    async def lend(self, guest_offset: int, length: int) -> list[Buffer]:
        """As `lend_nowait`, once all is inflated.

        Raises:
            As `readv`.
        """
        last = guest_offset + length - 1 >> self._cluster_bits
        first = guest_offset >> self._cluster_bits
        found = await self._inflated(first, last)
        parts = [found[cluster] for cluster in range(first, last + 1)]
        return self._cut(parts, guest_offset, length)

    async def readv(self, views: Sequence[memoryview], guest_offset: int) -> None:
        """Fill the flat `views` from a range of one or more compressed clusters.

        The caller has called `begin_io`, or nobody writes to the image. A read that fails or is
        cancelled leaves undefined contents in `views`; what is being inflated for it goes on, and
        is there for the next reader.

        Raises:
            CorruptImageError: A descriptor points outside the file, or what is there does not
                inflate to a cluster.
            NotCompressed: A cluster is mapped in another way by now.
            UnsupportedError: No library for the compression is installed.
            StorageError: The image file cannot be read.
        """
        end = guest_offset + total_length(views)
        rest = list(views)
        while guest_offset < end:
            # Cut at clusters, so that none is needed for two segments.
            boundary = (guest_offset | self._cluster_size - 1) + 1
            length = min(end, max(boundary, guest_offset + _SEGMENT_BYTES)) - guest_offset
            if guest_offset + length < end:
                length -= guest_offset + length & self._cluster_size - 1
            for part in await self.lend(guest_offset, length):
                rest = copy_into(rest, part)
            guest_offset += length

    def forget(self, first_guest_cluster: int, count: int) -> None:
        """Forget clusters whose mapping changed. A plain function.

        What is being inflated for them by now does not enter the cache.
        """
        self._cache.drop_range(self._namespace + first_guest_cluster, count)
        if not self._inflight:
            return
        last = first_guest_cluster + count - 1
        for cluster in [c for c in self._inflight if first_guest_cluster <= c <= last]:
            del self._inflight[cluster]

    def forget_all(self) -> None:
        """Forget every cluster, because the file may have been changed by others."""
        self.forget(0, 1 << 64 - self._cluster_bits)
        self._begun.clear()

    async def close(self) -> None:
        """Inflate ahead no more, forget all, and return when nothing uses the storage any more."""
        self._closed = True
        for job in self._jobs:
            job.reading.cancel()
        while self._jobs:
            await next(iter(self._jobs)).done.wait()
        self.forget_all()
        self._cache.drop_buffers()

    # --- what is there ------------------------------------------------------------------------

    def _take(self, clusters: Iterable[int], found: dict[int, Inflated]) -> list[int]:
        """Enter those of `clusters` that are in memory into `found`; return the others.

        Where they were inflated ahead, or are left from an earlier pass, more is inflated ahead.
        """
        cache, namespace = self._cache, self._namespace
        missing: list[int] = []
        fresh: list[int] = []
        for cluster in clusters:
            key = namespace + cluster
            was_used = key in cache.young
            data = cache.get(key)
            if data is None:
                data = self._take_early(cluster)
                if data is None:
                    missing.append(cluster)
                    continue
                fresh.append(cluster)
            elif not was_used:
                fresh.append(cluster)
            found[cluster] = data
        if fresh:
            self._read_ahead(fresh[0], fresh[-1] - fresh[0] + 1, missed=False)
        return missing

    def _take_early(self, cluster: int) -> Inflated | None:
        """The cluster if it is inflated by now in a job that has not ended."""
        job = self._inflight.get(cluster)
        if job is None:
            return None
        data = job.results.get(cluster)
        return None if isinstance(data, Exception) else data

    def _take_one(self, cluster: int, length: int) -> Inflated | None:
        """At least the first `length` bytes of a cluster, if they are to be had at once."""
        found: dict[int, Inflated] = {}
        if not self._take((cluster,), found):
            return found[cluster]
        return self._inflate_here(cluster, length)

    def _cut(self, clusters: Iterable[Inflated], guest_offset: int, length: int) -> list[Buffer]:
        """Cut off what lies around a range, from the clusters that it touches."""
        size = self._cluster_size
        parts: list[Buffer] = [*clusters]
        end = (guest_offset + length - 1 & size - 1) + 1
        if end < size:
            parts[-1] = memoryview(parts[-1])[:end]
        if within := guest_offset & size - 1:
            parts[0] = memoryview(parts[0])[within:]
        return parts

    def _inflate_here(self, cluster: int, length: int) -> bytes | None:
        """Inflate a small cluster in the caller's thread if its data can be had without waiting.

        Anything that is wrong is left to `readv` to find and tell.

        Returns:
            All of it, which is kept; or at least its first `length` bytes, if it was not read
            lately: who reads a little here and there would wait for much that nobody asks for.
        """
        if self._cluster_size > _INLINE_BYTES or cluster in self._inflight:
            return None
        (entry,) = self._descriptors_nowait(range(cluster, cluster + 1))
        if not entry:
            return None
        is_start = length <= self._longest_start and cluster not in self._begun
        buffer = self._cache.take_buffer(0)
        try:
            host_offset, compressed_length = self._place(cluster, entry)
            frame = memoryview(buffer)[:compressed_length]
            if self._storage.readv_nowait((frame,), host_offset) != compressed_length:
                return None
            if is_start:
                data = inflate_deflate(frame, length, self._cluster_size)
            else:
                data = self._inflate(frame, self._cluster_size)
        except (CorruptImageError, InflateError, UnsupportedError):
            return None
        finally:
            self._cache.give_buffer(buffer)
        if is_start:
            self._begun[cluster] = None
            if len(self._begun) > self._most_begun:
                del self._begun[next(iter(self._begun))]
        else:
            self._begun.pop(cluster, None)
            self._cache.put(self._namespace + cluster, data)
        self._read_ahead(cluster, 1, missed=True)
        return data

    # --- waiting for what is not --------------------------------------------------------------

    async def _inflated(self, first: int, last: int) -> dict[int, Inflated]:
        """The clusters from `first` to `last`, both included."""
        found: dict[int, Inflated] = {}
        own: set[InflateJob] = set()
        loaded: tuple[int, int] | None = None
        while True:
            jobs, unknown = self._look_up(range(first, last + 1), found, own, loaded)
            if unknown is not None:
                entry = await self._descriptor(unknown)
                if not entry:
                    raise NotCompressed(unknown << self._cluster_bits)
                loaded = unknown, entry
                continue
            if not jobs:
                return found
            for job in jobs:
                job.awaited = True
            self._cache.threads.settle()
            for job, clusters in jobs.items():
                await job.done.wait()
                self._collect(job, clusters, found, job in own)

    def _look_up(
        self,
        clusters: range,
        found: dict[int, Inflated],
        own: set[InflateJob],
        loaded: tuple[int, int] | None,
    ) -> tuple[dict[InflateJob, list[int]], int | None]:
        """Find clusters, and begin to inflate those that nobody inflates yet. A plain function.

        Args:
            clusters: What is needed.
            found: What there is of it; more is entered here.
            own: Jobs that this reader began; more are entered here.
            loaded: A cluster and its descriptor, just loaded.

        Returns:
            The jobs to wait for with the clusters to take from each (it may have others whose
            mapping has changed since), and a cluster whose descriptor must be loaded first, if any.
        """
        jobs: dict[InflateJob, list[int]] = {}
        places: dict[int, CompressedRange] = {}
        missing = self._take([c for c in clusters if c not in found], found)
        if not missing:
            return jobs, None
        waiting_from = missing[0]
        for cluster in missing:
            job = self._inflight.get(cluster)
            if job is not None:
                jobs.setdefault(job, []).append(cluster)
                continue
            if loaded is not None and loaded[0] == cluster:
                entry = loaded[1]
            else:
                (entry,) = self._descriptors_nowait(range(cluster, cluster + 1))
            if not entry:
                return {}, cluster
            places[cluster] = self._place(cluster, entry)
        if places:
            begun = self._begin(places, ahead=False)
            own.update(begun)
            jobs.update((job, list(job.places)) for job in begun)
            waiting_from = next(iter(places))
        self._read_ahead(waiting_from, clusters.stop - waiting_from, missed=bool(places))
        return jobs, None

    def _collect(
        self, job: InflateJob, clusters: list[int], found: dict[int, Inflated], is_own: bool
    ) -> None:
        """Enter what `job` inflated of `clusters` into `found`, or raise why it could not.

        If what another reader, or nobody, asked for could not be read, that is not raised: this
        reader then begins a job of its own.
        """
        for cluster in clusters:
            result = job.results.get(cluster)
            if isinstance(result, bytes | memoryview):
                found[cluster] = result
            elif isinstance(result, InflateError):
                raise self._corrupt(cluster, job.places[cluster].host_offset, str(result))
            elif is_own:
                raise result or job.error or MemoryError("no cluster could be inflated")

    def _place(self, cluster: int, entry: int) -> CompressedRange:
        """Where a cluster's data is, not past the file's end."""
        place = compressed_range(entry, self._cluster_bits)
        left = self._storage.size() - place.host_offset
        if left <= 0:
            raise self._corrupt(cluster, place.host_offset, "that is past the end of the file")
        return place if place.length <= left else CompressedRange(place.host_offset, left)

    def _corrupt(self, cluster: int, host_offset: int, reason: str) -> CorruptImageError:
        return CorruptImageError(
            f"the compressed cluster of guest offset {cluster << self._cluster_bits:#x} at host "
            f"offset {host_offset:#x} cannot be read: {reason}",
            filename=self._filename,
        )

    # --- inflating ahead ----------------------------------------------------------------------

    def _read_ahead(self, first: int, count: int, *, missed: bool) -> None:
        """Note what is being read, and begin to inflate what is likely to be read next."""
        ahead = self._sequence.touch(first, count, missed=missed)
        if ahead is None or self._closed:
            return
        namespace = self._namespace
        known = self._inflight.keys() & ahead
        for key in self._cache.kept(range(namespace + ahead.start, namespace + ahead.stop)):
            known.add(key - namespace)
        bits, end = self._cluster_bits, self._storage.size()
        places: dict[int, CompressedRange] = {}
        for cluster, entry in zip(ahead, self._descriptors_nowait(ahead), strict=True):
            if entry and cluster not in known:
                place = compressed_range(entry, bits)
                if place.host_offset + place.length <= end:
                    places[cluster] = place
                elif place.host_offset < end:  # else whoever really reads it will be told
                    places[cluster] = CompressedRange(place.host_offset, end - place.host_offset)
        if places:
            self._begin(places, ahead=True)

    # --- jobs ---------------------------------------------------------------------------------

    def _begin(self, places: dict[int, CompressedRange], *, ahead: bool) -> list[InflateJob]:
        """Begin to inflate the clusters at `places`, in as few jobs as keeps the threads busy."""
        per_job = self._clusters_per_job
        items = list(places.items())
        return [
            self._begin_job(dict(items[start : start + per_job]), ahead=ahead)
            for start in range(0, len(items), per_job)
        ]

    def _begin_job(self, places: dict[int, CompressedRange], *, ahead: bool) -> InflateJob:
        job = InflateJob(places, ahead=ahead, io_token=self._begin_io())
        self._jobs.add(job)
        self._inflight.update(dict.fromkeys(places, job))
        if not ahead:  # what is inflated ahead is read by the thread, this one has more to do
            self._read_nowait(job)
        self._go_on(job)
        return job

    def _read_nowait(self, job: InflateJob) -> None:
        """Read what a job needs as far as that needs no waiting, in any thread."""
        try:
            job.read_nowait(self._storage.readv_nowait, self._cache.take_buffer)
        except Exception as error:  # it is raised again where somebody asked for the job
            job.error = error

    def _go_on(self, job: InflateJob) -> None:
        """Do what is next for a job. A plain function, for trio's thread."""
        if job.error is not None or job.results:
            self._finish(job)
        elif not job.missing:
            self._cache.threads.submit(
                lambda: self._work(job), lambda: self._go_on(job), lambda: job.awaited
            )
        else:
            try:
                trio.lowlevel.spawn_system_task(self._read, job)
            except RuntimeError as error:  # trio's loop is ending
                job.error = error
                self._finish(job)

    def _work(self, job: InflateJob) -> None:
        """Inflate a job's clusters, in a thread, if what it needs can be read at once."""
        if job.buffer is None:
            self._read_nowait(job)
        if job.error is None and not job.missing:
            # Only what leaves the cache together may share memory.
            many = self._inflate_many if job.ahead else None
            job.inflate(self._inflate, many, self._cluster_size)
        if job.missing:
            job.awaited = True  # trio's thread has to read the rest
        elif job.buffer is not None:
            # At once: trio's thread may call `_finish` much later.
            self._cache.give_buffer(job.buffer)

    async def _read(self, job: InflateJob) -> None:
        """Read what a job needs; a task of the system's own, so that no reader can cancel it."""
        job.error = ClosedError("the image is closed", filename=self._filename)
        try:
            with job.reading:
                for view, host_offset in job.missing:
                    await self._storage.readv((view,), host_offset)
                job.error = None
        except Exception as error:  # it is raised again where somebody asked for the job
            job.error = error
        finally:
            job.missing = []
            self._go_on(job)

    def _finish(self, job: InflateJob) -> None:
        """Put what a job inflated into the cache, and wake who waits for it. A plain function."""
        inflight, results, namespace = self._inflight, job.results, self._namespace
        ready: dict[int, Inflated] = {}
        for cluster in job.places:
            if inflight.get(cluster) is not job:
                continue  # its mapping changed meanwhile
            del inflight[cluster]
            data = results.get(cluster)
            if data is not None and not isinstance(data, Exception):
                ready[namespace + cluster] = data
        self._cache.put_inflated(ready, ahead=job.ahead)
        self._jobs.discard(job)
        self._end_io(job.io_token)
        job.done.set()
