"""FormatAccess: a disk image with its chain, as one flat range of bytes.

Checks ranges, resolves the chain, splits requests and fans them out. This is what a reader of
images uses, and what the daemon serves.

Every method that takes an offset counts bytes of the guest's disk. A range must lie inside it:
anything else is `OutOfRangeError`, and nothing is read, written or clipped.

Cancellation (trio cancel scopes) may end any await: no lock stays behind, the image can be used
on, and each sector that a write was about to change has its old or its new contents.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Self

import trio

from .caching import MetadataCache
from .errors import (
    ClosedError,
    OutOfRangeError,
    ReadOnlyError,
    UnsupportedError,
    WrongTypeError,
)
from .format.base import HOST_OFFSET_MASK, IN_PLACE, STORAGE_MASK, DiscardTo, FormatDriver
from .inflight import InFlight
from .mapping import RawMapping
from .parallel import run_parallel
from .reading import ReadAccess, checked_parallelism
from .resolved import CHUNK_GRANULES, NotCached, Run
from .storage.base import PreallocateMode
from .vectors import flat_views, split_views, total_length

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .vectors import IoVector

__all__ = ["FormatAccess"]

#: A multiple of every cluster size, so that the pieces of a write share no cluster.
_WRITE_PIECE = 2 << 20


class _Changes(InFlight):
    """Changes in flight. Those that a close could not wait for are not said to be made."""

    __slots__ = ("_cut_off",)

    def __init__(self) -> None:
        super().__init__()
        self._cut_off = False

    def cut_off(self) -> None:
        """Let what is still in flight raise ClosedError: it may be lost."""
        self._cut_off = True

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        if self._cut_off and exc_info[0] is None:
            raise ClosedError("the image was closed meanwhile; the change may be lost")


class FormatAccess(ReadAccess):
    """Reads and writes an open image through its chain.

    Several images may stand on the same layer (`backing=` the same FormatAccess): it stays open
    until the last of them is closed. It belongs to one trio loop: for several threads, or none,
    there is SyncFormatAccess.

    Args:
        driver: The top layer. Its `backing` is the layer below.
        cache: Where the resolved map is kept; None: a cache of its own.

    Raises:
        WrongTypeError: `driver` is no FormatDriver.
    """

    def __init__(self, driver: FormatDriver, *, cache: MetadataCache | None = None) -> None:
        super().__init__(driver, cache=cache)
        self._write_parallelism = 1
        self._changes = _Changes()
        self._all_closed = trio.Event()
        #: Open layers that stand on this one.
        self._above: weakref.WeakSet[FormatDriver] = weakref.WeakSet()
        if driver.backing is not None:
            driver.backing._above.add(driver)

    @property
    def write_parallelism(self) -> int:
        """How many pieces of one large write are written at the same time: 1 at first.

        Above 1 a write of several MiB is split at multiples of 2 MiB. Two such writes to the same
        range at the same time may then each win some of the pieces.

        Raises:
            OutOfRangeError: It is set to less than 1.
            WrongTypeError: It is set to something else than an int.
        """
        return self._write_parallelism

    @write_parallelism.setter
    def write_parallelism(self, requests: int) -> None:
        self._write_parallelism = checked_parallelism(requests)

    # --- the fast path --------------------------------------------------------------------------

    def write_nowait(self, view: memoryview, guest_offset: int) -> bool:
        """Write the flat `view` if that needs no waiting. A plain function.

        The range must lie inside the image; this method does not check it.

        Returns:
            True: written. False: give all of it to `writev`.
        """
        length = view.nbytes
        if not self.driver.can_write_nowait(guest_offset, length):
            return False
        within = guest_offset & self._granule - 1
        if within + length <= self._granule:
            chunk = self._cache.young.get(self._namespace + (guest_offset >> self._chunk_bits))
            if chunk is not None:
                entry = chunk[guest_offset >> self._granule_bits & CHUNK_GRANULES - 1]
                if entry & IN_PLACE:
                    place = (entry & HOST_OFFSET_MASK) + within
                    return self._writers[entry & STORAGE_MASK]((view,), place) == length
        runs = self._runs_in_place(guest_offset, length)
        if runs:
            return self._write_runs(runs, view)
        return self.driver.write_nowait(view, guest_offset)

    def prepare_write_nowait(
        self, view: memoryview, guest_offset: int
    ) -> Callable[[], bool] | None:
        """What does a `write_nowait` in another thread, where nothing needs to be allocated.

        A plain function. The range must lie inside the image; this method does not check it.

        Returns:
            What writes, and returns what `write_nowait` does; None if it must be done here. Until
            it has ended nothing but plain reads and writes may be done with the image.
        """
        length = view.nbytes
        if not self.driver.can_write_nowait(guest_offset, length):
            return None
        runs = self._runs_in_place(guest_offset, length)
        for code, place, run_length in runs:
            storage = self._map.storages[code]
            # To prolong a file is for one thread alone.
            if not storage.writes_in_threads or place + run_length > storage.size():
                return None
        return partial(self._write_runs, runs, view) if runs else None

    def _runs_in_place(self, guest_offset: int, length: int) -> list[Run]:
        """Where a range may be overwritten; empty if not all of it, or if it is not known."""
        try:
            return self._map.runs(guest_offset, length, in_place=True)
        except NotCached:
            return []

    def _write_runs(self, runs: list[Run], view: memoryview) -> bool:
        position = 0
        for code, place, length in runs:
            part = view[position : position + length]
            if self._writers[code]((part,), place) != length:
                return False
            position += length
        return True

    # --- writing --------------------------------------------------------------------------------

    async def write(self, buffer: Buffer, guest_offset: int) -> None:
        """Write `buffer` at `guest_offset`.

        It is durable after the next `sync`, and in the image file after the next `flush`.

        Raises:
            OutOfRangeError: The range does not lie inside the image. Nothing was written.
            ReadOnlyError: The image is open read-only.
            CorruptImageError: A table entry is wrong.
            StorageError: A storage failed; each sector has its old or its new contents.
            SyncLostError: An earlier sync failed.
            ClosedError: The image was closed.
            WrongTypeError: `buffer` is no buffer, or the offset no int.
        """
        await self.writev((buffer,), guest_offset)

    async def writev(self, buffers: Iterable[Buffer] | IoVector, guest_offset: int) -> None:
        """Write `buffers`, one after the other, at `guest_offset`.

        Raises:
            As `write`.
        """
        views = flat_views(buffers)
        length = total_length(views)
        self._check_write(guest_offset, length)
        if not length:
            return
        if len(views) == 1 and self.write_nowait(views[0], guest_offset):
            await trio.lowlevel.checkpoint()
            return
        with self._changes:
            if self._write_parallelism > 1 and length > _WRITE_PIECE:
                await self._write_pieces(views, guest_offset)
            else:
                await self.driver.writev(views, guest_offset)

    async def _write_pieces(self, views: list[memoryview], guest_offset: int) -> None:
        """Write piece by piece, some of them at the same time."""
        pieces: list[tuple[list[memoryview], int]] = []
        while views:
            part, views = split_views(views, _WRITE_PIECE - guest_offset % _WRITE_PIECE)
            pieces.append((part, guest_offset))
            guest_offset += total_length(part)
        queue = iter(pieces)

        async def work() -> None:
            for part, offset in queue:
                # Again: meanwhile the disk may have become smaller.
                self._check_write(offset, total_length(part))
                await self.driver.writev(part, offset)

        await run_parallel(work, min(self._write_parallelism, len(pieces)))

    async def write_zeroes(self, guest_offset: int, length: int, *, allocate: bool = False) -> None:
        """Make a range read as zero; with `allocate`, keep or take host space for it.

        Raises:
            As `write`.
        """
        self._check_write(guest_offset, length)
        if length:
            with self._changes:
                await self.driver.write_zeroes(guest_offset, length, allocate=allocate)

    async def discard_to_any(self, guest_offset: int, length: int) -> None:
        """Give a range's space back; what it reads as afterwards is undefined.

        Raises:
            As `write`.
        """
        await self._discard(guest_offset, length, DiscardTo.ANY)

    async def discard_to_zero(self, guest_offset: int, length: int) -> None:
        """Give a range's space back; it reads as zero afterwards.

        Raises:
            As `write`.
        """
        await self._discard(guest_offset, length, DiscardTo.ZERO)

    async def discard_to_backing(self, guest_offset: int, length: int) -> None:
        """Give a range's space back; the layer below shows through afterwards.

        Parts of clusters at the edges are left as they are.

        Raises:
            As `write`, and UnsupportedError where the format has no layers.
        """
        await self._discard(guest_offset, length, DiscardTo.BACKING)

    async def _discard(self, guest_offset: int, length: int, to: DiscardTo) -> None:
        self._check_write(guest_offset, length)
        if length:
            with self._changes:
                await self.driver.discard(guest_offset, length, to)

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        """Set the disk's size in bytes. What a larger size adds reads as zero.

        Raises:
            OutOfRangeError: The format cannot hold the size.
            UnsupportedError: This image cannot be resized (the message says why).
            ReadOnlyError: The image is open read-only.
            StorageError: A storage failed; the size is the old one or the new one.
            ClosedError: The image was closed.
            WrongTypeError: `size` is no int, or `preallocate` no PreallocateMode.
        """
        self._check_write(0, 0)
        if not isinstance(size, int) or not isinstance(preallocate, PreallocateMode):
            raise WrongTypeError(f"no size or no PreallocateMode: {size!r}, {preallocate!r}")
        if size < 0:
            raise OutOfRangeError(f"a size of {size} bytes", filename=self.filename)
        with self._changes:
            await self.driver.resize(size, preallocate)
        self._map.forget(0, max(self.size(), size, 1))

    # --- mappings -------------------------------------------------------------------------------

    async def ensure_data_mapping(
        self, guest_offset: int, length: int, *, overwrite: bool = False
    ) -> RawMapping:
        """Map (a first part of) a range to host bytes that may be written directly.

        Args:
            guest_offset: Where the range starts.
            length: Bytes wanted, above zero.
            overwrite: The caller will write all of the mapping; its old contents are not kept.

        Returns:
            A writable mapping with 0 < length <= the length wanted. It holds until the range is
            discarded, zeroed or cut off by a resize.

        Raises:
            As `write`.
        """
        self._check_write(guest_offset, length)
        if not length:
            raise OutOfRangeError("a mapping has at least one byte", filename=self.filename)
        with self._changes:
            return await self.driver.ensure_data_mapping(guest_offset, length, overwrite=overwrite)

    async def ensure_zero_mapping(self, guest_offset: int, length: int) -> tuple[int, int]:
        """Make as much of a range as the format can say so read as zero; no data is written.

        Only whole units of `FormatDriver.zero_granularity` are mapped as zero, the disk's last one
        if the range reaches the disk's end. What lies around them keeps its contents;
        `write_zeroes` zeroes all of a range.

        Returns:
            Guest offset and length of the part that reads as zero now. The length is 0 if no
            whole unit lies in the range.

        Raises:
            UnsupportedError: The format cannot map zeroes.
            As `write`.
        """
        self._check_write(guest_offset, length)
        unit = self.driver.zero_granularity
        if unit is None:
            raise UnsupportedError(
                f"{self.format_name} cannot map zeroes here; write them", filename=self.filename
            )
        start, end = guest_offset + -guest_offset % unit, guest_offset + length
        if end < self.size():
            end -= end % unit
        if start >= end:
            return guest_offset, 0
        with self._changes:
            await self.driver.write_zeroes(start, end - start)
        return start, end - start

    # --- durability -----------------------------------------------------------------------------

    async def flush(self) -> None:
        """Write everything to the image file, metadata included, so that others find it.

        Raises:
            StorageError: A storage failed; nothing was forgotten, a later flush tries again.
            SyncLostError: A sync failed, now or earlier.
            ClosedError: The image was closed.
        """
        self._check_open()
        if self.writable:
            await self.driver.flush()

    async def sync(self) -> None:
        """Flush, and make everything durable.

        Raises:
            As `flush`.
        """
        self._check_open()
        if self.writable:
            await self.driver.sync()

    async def invalidate_cache(self) -> None:
        """Forget what is cached, so that changes that others made to the files are seen.

        Raises:
            ImagofsError: There is metadata that was not flushed.
            StorageError: A storage failed.
            ClosedError: The image was closed.
        """
        self._check_open()
        for layer in self.layers():
            await layer.invalidate_cache()
        self._cache.drop_namespace(self._namespace)

    async def close(self) -> None:
        """Wait for the changes in flight, flush and sync; then close every file of the chain and
        empty its caches, even if that failed or was cancelled.

        What is asked meanwhile raises `ClosedError`, and so does a change that a cancelled close
        did not wait for. A layer on which another open image stands stays open.

        Raises:
            As `flush`. The image is closed all the same.
        """
        if self._closed:
            await self._all_closed.wait()
            return
        self._closed = True
        try:
            await self._changes.ended()
            if self.writable:
                await self.driver.sync()
        finally:
            self._changes.cut_off()
            with trio.CancelScope(shield=True):
                try:
                    await self._close_layers()
                finally:
                    # The garbage collector may be long in coming to an image that was closed.
                    self._cache.clear()
                    self._all_closed.set()

    async def _close_layers(self) -> None:
        below = self.driver.backing
        try:
            await self.driver.close()
        finally:
            if below is not None:
                below._above.discard(self.driver)
                if not below._above:
                    await below.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    # --- checks ---------------------------------------------------------------------------------

    def _check_write(self, guest_offset: int, length: int) -> None:
        self._check_range(guest_offset, length)
        if not self.writable:
            raise ReadOnlyError("the image is open read-only", filename=self.filename)
