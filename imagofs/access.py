"""FormatAccess: a disk image with its chain, as one flat range of bytes.

Checks ranges, resolves the chain, splits requests and fans them out. This is what a reader of
images uses, and what the daemon serves.

Every method that takes an offset counts bytes of the guest's disk. A range must lie inside it:
anything else is `OutOfRangeError`, and nothing is read, written or clipped.

Cancellation (trio cancel scopes) may end any await: no lock stays behind, the image can be used
on, and each sector that a write was about to change has its old or its new contents.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, Self

import trio

from .caching import DEFAULT_METADATA_BYTES, MetadataCache
from .errors import ClosedError, OutOfRangeError, ReadOnlyError
from .format.base import (
    HOST_OFFSET_MASK,
    IN_PLACE,
    STORAGE_MASK,
    DiscardTo,
    FormatDriver,
    unique_storages,
)
from .mapping import (
    EofMapping,
    IndirectMapping,
    Mapping,
    RawMapping,
    ShallowMapping,
    SpecialMapping,
    ZeroMapping,
)
from .resolved import CHUNK_GRANULES, MIXED, SPECIAL, ZERO, NotCached, ResolvedMap, Run
from .storage.base import PreallocateMode, Storage
from .vectors import fill_view, fill_views, flat_views, split_views, total_length

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .vectors import IoVector

__all__ = ["FormatAccess"]

_FIRST_CODE = 252
_FAN_OUT = 8  # requests of one read that are in flight at the same time


class FormatAccess:
    """Reads and writes an open image through its chain.

    Args:
        driver: The top layer. Its `backing` is the layer below.
        cache: Where the resolved map is kept; the chain's own, if it has one.
    """

    def __init__(self, driver: FormatDriver, *, cache: MetadataCache | None = None) -> None:
        self.driver = driver
        self._closed = False
        self._cache = cache or MetadataCache(DEFAULT_METADATA_BYTES)
        self._map = ResolvedMap(self.layers(), self._cache)
        self._readers = tuple(storage.readv_nowait for storage in self._map.storages)
        self._writers = tuple(storage.writev_nowait for storage in self._map.storages)
        # The fast path's own copies: an attribute less on each request.
        self._namespace = self._map.namespace
        self._chunk_bits = self._map.chunk_bits
        self._granule_bits = self._map.granule_bits
        self._granule = self._map.granule

    # --- facts --------------------------------------------------------------------------------

    def size(self) -> int:
        """The disk's size in bytes."""
        return self.driver.size()

    @property
    def writable(self) -> bool:
        """Whether the image was opened for writing."""
        return self.driver.writable

    @property
    def format_name(self) -> str:
        """The top layer's format, as `qemu-img` spells it."""
        return self.driver.format_name

    @property
    def filename(self) -> str | None:
        """The top layer's file name."""
        return self.driver.filename

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def layers(self) -> list[FormatDriver]:
        """The chain's drivers, the top one first."""
        layers = [self.driver]
        while (below := layers[-1].backing) is not None:
            layers.append(below.driver)
        return layers

    def storages(self) -> tuple[Storage, ...]:
        """Every storage that the chain uses, each once, the top layer's first."""
        return unique_storages(self.layers())

    def allocated_bytes(self) -> int:
        """Bytes of host space that the whole chain takes."""
        return sum(layer.allocated_bytes() for layer in self.layers())

    # --- the fast path --------------------------------------------------------------------------

    def read_nowait(self, view: memoryview, guest_offset: int) -> bool:
        """Fill the flat `view` if that needs no waiting. A plain function.

        The range must lie inside the image; this method does not check it.

        Returns:
            True: `view` is filled. False: ask `readv`; what is in `view` is undefined.
        """
        length = view.nbytes
        within = guest_offset & self._granule - 1
        if within + length <= self._granule:
            chunk = self._cache.young.get(self._namespace + (guest_offset >> self._chunk_bits))
            if chunk is not None:
                entry = chunk[guest_offset >> self._granule_bits & CHUNK_GRANULES - 1]
                code = entry & STORAGE_MASK
                if code < _FIRST_CODE:
                    place = (entry & HOST_OFFSET_MASK) + within
                    return self._readers[code]((view,), place) == length
                if code == SPECIAL:
                    return self._map.layers[entry >> 9].special_nowait(view, guest_offset)
        try:
            runs = self._map.runs(guest_offset, length)
        except NotCached:
            return False
        return self._read_runs_nowait(runs, view, guest_offset)

    def _read_runs_nowait(self, runs: list[Run], view: memoryview, guest_offset: int) -> bool:
        position = 0
        for code, place, length in runs:
            part = view[position : position + length]
            if code < _FIRST_CODE:
                if self._readers[code]((part,), place) != length:
                    return False
            elif code == ZERO:
                fill_view(part)
            elif code == SPECIAL:
                if not self._map.layers[place].special_nowait(part, guest_offset + position):
                    return False
            else:
                return False
            position += length
        return True

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
        if not self._map.in_place(guest_offset, length):
            return self.driver.write_nowait(view, guest_offset)
        position = 0
        for code, place, run_length in self._map.runs(guest_offset, length):
            part = view[position : position + run_length]
            if self._writers[code]((part,), place) != run_length:
                return False
            position += run_length
        return True

    # --- reading --------------------------------------------------------------------------------

    async def read(self, buffer: Buffer, guest_offset: int) -> None:
        """Fill `buffer` with the bytes from `guest_offset` on.

        Raises:
            OutOfRangeError: The range does not lie inside the image.
            CorruptImageError: A table entry is wrong.
            StorageError: A storage failed.
            ClosedError: The image was closed.
        """
        await self.readv((buffer,), guest_offset)

    async def readv(self, buffers: Iterable[Buffer] | IoVector, guest_offset: int) -> None:
        """Fill `buffers`, one after the other, with the bytes from `guest_offset` on.

        Raises:
            As `read`.
        """
        views = flat_views(buffers)
        length = total_length(views)
        self._check_range(guest_offset, length)
        if not length:
            return
        if any(view.readonly for view in views):
            raise TypeError("a read needs writable buffers")
        token = self.driver.begin_io()
        try:
            await self._read_runs(await self._runs(guest_offset, length), views, guest_offset)
        finally:
            self.driver.end_io(token)

    async def _runs(self, guest_offset: int, length: int) -> list[Run]:
        while True:
            try:
                return self._map.runs(guest_offset, length)
            except NotCached as missing:
                await missing.driver.get_mapping(missing.guest_offset, 1)

    async def _read_runs(self, runs: list[Run], views: list[memoryview], guest_offset: int) -> None:
        waiting: list[tuple[Run, list[memoryview], int]] = []
        for run in runs:
            parts, views = split_views(views, run.length)
            if run.code == ZERO:
                fill_views(parts)
            elif run.code >= _FIRST_CODE or (
                self._readers[run.code](parts, run.position) != run.length
            ):
                waiting.append((run, parts, guest_offset))
            guest_offset += run.length
        if len(waiting) == 1:
            await self._read_run(*waiting[0])
        elif waiting:
            await self._fan_out(waiting)

    async def _fan_out(self, waiting: list[tuple[Run, list[memoryview], int]]) -> None:
        """Read several runs, some of them at the same time."""
        queue = iter(waiting)

        async def work() -> None:
            for job in queue:
                await self._read_run(*job)

        await _run_all(work, min(_FAN_OUT, len(waiting)))

    async def _read_run(self, run: Run, views: list[memoryview], guest_offset: int) -> None:
        if run.code < _FIRST_CODE:
            await self._map.storages[run.code].readv(views, run.position)
        elif run.code == SPECIAL:
            await self._map.layers[run.position].readv_special(views, guest_offset)
        else:
            assert run.code == MIXED
            await self._read_mixed(views, guest_offset)

    async def _read_mixed(self, views: list[memoryview], guest_offset: int) -> None:
        """Read a range layer by layer, mapping by mapping."""
        length = total_length(views)
        while length:
            mapping = await self._mapping(guest_offset, length)
            parts, views = split_views(views, mapping.length)
            match mapping:
                case RawMapping():
                    await mapping.storage.readv(parts, mapping.offset)
                case SpecialMapping():
                    await mapping.driver.readv_special(parts, mapping.offset)
                case _:
                    fill_views(parts)
            guest_offset += mapping.length
            length -= mapping.length

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
        await self.driver.writev(views, guest_offset)

    async def write_zeroes(self, guest_offset: int, length: int, *, allocate: bool = False) -> None:
        """Make a range read as zero; with `allocate`, keep or take host space for it.

        Raises:
            As `write`.
        """
        self._check_write(guest_offset, length)
        if length:
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
            await self.driver.discard(guest_offset, length, to)

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        """Set the disk's size in bytes. What a larger size adds reads as zero.

        Raises:
            OutOfRangeError: The format cannot hold the size.
            UnsupportedError: This image cannot be resized (the message says why).
            ReadOnlyError: The image is open read-only.
        """
        self._check_write(0, 0)
        if size < 0:
            raise OutOfRangeError(f"a size of {size} bytes", filename=self.filename)
        await self.driver.resize(size, preallocate)
        self._map.forget(0, max(self.size(), size, 1))

    # --- mappings -------------------------------------------------------------------------------

    async def get_shallow_mapping(self, guest_offset: int, max_length: int) -> ShallowMapping:
        """Where the top layer says the bytes from `guest_offset` on are.

        Raises:
            OutOfRangeError: A negative offset, or a `max_length` below 1.
            CorruptImageError: A table entry is wrong.
        """
        self._check_open()
        if guest_offset < 0 or max_length < 1:
            raise OutOfRangeError(
                f"no mapping of {max_length} bytes at {guest_offset}", filename=self.filename
            )
        return await self.driver.get_mapping(guest_offset, max_length)

    async def get_mapping(self, guest_offset: int, max_length: int) -> Mapping:
        """Where the bytes from `guest_offset` on are, whatever layer has them.

        Returns:
            A mapping with 0 < length <= max_length, or EofMapping at or past the end.

        Raises:
            As `get_shallow_mapping`.
        """
        await self.get_shallow_mapping(guest_offset, max_length)
        return await self._mapping(guest_offset, max_length)

    async def _mapping(self, guest_offset: int, max_length: int) -> Mapping:
        access, offset, length = self, guest_offset, max_length
        while True:
            mapping = await access.driver.get_mapping(offset, length)
            match mapping:
                case IndirectMapping():
                    access, offset, length = mapping.layer, mapping.offset, mapping.length
                case EofMapping() if access is not self:
                    # The end of a shorter lower layer reads as zeroes.
                    return ZeroMapping(length, explicit=False)
                case RawMapping() if access is not self and mapping.writable:
                    return RawMapping(mapping.length, mapping.storage, mapping.offset)
                case _:
                    return mapping

    async def map(
        self, guest_offset: int = 0, length: int | None = None
    ) -> AsyncIterator[tuple[int, Mapping]]:
        """Walk a range: each guest offset with its mapping, like neighbours merged.

        Args:
            guest_offset: Where to begin.
            length: Bytes; None: up to the end.
        """
        length = self.size() - guest_offset if length is None else length
        self._check_range(guest_offset, length)
        end = guest_offset + length
        start, held = guest_offset, None
        while guest_offset < end:
            mapping = await self._mapping(guest_offset, end - guest_offset)
            merged = _merge(held, mapping)
            if merged is None:
                if held is not None:
                    yield start, held
                start, held = guest_offset, mapping
            else:
                held = merged
            guest_offset += mapping.length
        if held is not None:
            yield start, held

    async def ensure_data_mapping(
        self, guest_offset: int, length: int, *, overwrite: bool = False
    ) -> RawMapping:
        """Map (a first part of) a range to host bytes that may be written directly.

        Args:
            guest_offset: Where the range starts.
            length: Bytes wanted, above zero.
            overwrite: The caller will write all of the mapping; its old contents are not kept.

        Raises:
            As `write`.
        """
        self._check_write(guest_offset, length)
        if not length:
            raise OutOfRangeError("a mapping has at least one byte", filename=self.filename)
        return await self.driver.ensure_data_mapping(guest_offset, length, overwrite=overwrite)

    async def ensure_zero_mapping(self, guest_offset: int, length: int) -> None:
        """Make a range read as zero by its mapping alone where the format can do that.

        Raises:
            As `write`.
        """
        await self.write_zeroes(guest_offset, length)

    # --- durability -----------------------------------------------------------------------------

    async def flush(self) -> None:
        """Write everything to the image file, metadata included, so that others find it.

        Raises:
            StorageError: A storage failed; nothing was forgotten, a later flush tries again.
            SyncLostError: A sync failed, now or earlier.
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
        """Forget what is cached, so that changes that others made to the files are seen."""
        self._check_open()
        for layer in self.layers():
            await layer.invalidate_cache()
        self._cache.drop_namespace(self._namespace)

    async def close(self) -> None:
        """Flush and sync, then close every file of the chain, even if that failed.

        Raises:
            As `flush`. The image is closed all the same.
        """
        if self._closed:
            return
        try:
            await self.sync()
        finally:
            self._closed = True
            with trio.CancelScope(shield=True):
                for layer in self.layers():
                    await layer.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    # --- checks ---------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the image is closed", filename=self.filename)

    def _check_range(self, guest_offset: int, length: int) -> None:
        self._check_open()
        if guest_offset < 0 or length < 0 or guest_offset + length > self.size():
            raise OutOfRangeError(
                f"{length} bytes at {guest_offset} do not lie in the disk's {self.size()}",
                filename=self.filename,
            )

    def _check_write(self, guest_offset: int, length: int) -> None:
        self._check_range(guest_offset, length)
        if not self.writable:
            raise ReadOnlyError("the image is open read-only", filename=self.filename)


async def _run_all(work: Any, tasks: int) -> None:
    """Run `work` in several tasks; the first error is raised as it is, not in a group."""
    error: BaseException | None = None

    async def guarded() -> None:
        nonlocal error
        try:
            await work()
        except Exception as exc:
            error = error or exc
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(guarded)
    if error is not None:
        raise error


def _merge(held: Mapping | None, new: Mapping) -> Mapping | None:
    """One mapping for two neighbours, None if they are not alike."""
    match held, new:
        case RawMapping(), RawMapping() if (
            held.storage is new.storage
            and held.offset + held.length == new.offset
            and held.writable == new.writable
        ):
            return RawMapping(held.length + new.length, held.storage, held.offset, held.writable)
        case ZeroMapping(), ZeroMapping() if (
            held.explicit == new.explicit and held.allocated == new.allocated
        ):
            return ZeroMapping(held.length + new.length, held.explicit, held.allocated)
        case SpecialMapping(), SpecialMapping() if (
            held.driver is new.driver and held.offset + held.length == new.offset
        ):
            return SpecialMapping(held.length + new.length, held.driver, held.offset)
    return None
