"""ReadAccess: the reading half of `FormatAccess`: facts, reads and mappings of a chain.

Requests are checked here, resolved through the chain's map, split where it says so, and fanned out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from .caching import DEFAULT_METADATA_BYTES, MetadataCache
from .errors import ClosedError, OutOfRangeError, WrongTypeError
from .format.base import HOST_OFFSET_MASK, STORAGE_MASK, FormatDriver, unique_storages
from .mapping import (
    EofMapping,
    IndirectMapping,
    Mapping,
    RawMapping,
    ShallowMapping,
    SpecialMapping,
    ZeroMapping,
    merge_mappings,
)
from .parallel import run_parallel
from .resolved import CHUNK_GRANULES, MIXED, SPECIAL, ZERO, NotCached, ResolvedMap, Run
from .storage.base import Storage
from .vectors import fill_view, fill_views, flat_views, split_views, total_length

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .vectors import IoVector

__all__ = ["Dependencies", "FileRange", "ReadAccess", "check_types", "checked_parallelism"]

_FIRST_CODE = 252
#: Bytes of tables that the cache has room for at least, per layer: a few tables of each.
_TABLES_PER_LAYER = 16 << 10
#: A range in more parts than this is not looked for in the page cache.
_MOST_FILE_RANGES = 64


#: A range of an open file: its descriptor, which its storage keeps; where it begins; its length
#: (bytes). A plain tuple, as ten of them may belong to one READ.
FileRange: TypeAlias = tuple[int, int, int]


class Dependencies(NamedTuple):
    """What an open image uses.

    Attributes:
        layers: The chain's drivers, the top one first.
        storages: Every storage of every layer, each once, the top layer's first.
    """

    layers: tuple[FormatDriver, ...]
    storages: tuple[Storage, ...]


class ReadAccess:
    """Reads an open image through its chain; see `FormatAccess`.

    Args:
        driver: The top layer. Its `backing` is the layer below.
        cache: Where the resolved map is kept; None: a cache of its own.
    """

    #: The top layer.
    driver: FormatDriver

    def __init__(self, driver: FormatDriver, *, cache: MetadataCache | None = None) -> None:
        if not isinstance(driver, FormatDriver):
            raise WrongTypeError(f"{driver!r} is no FormatDriver")
        self.driver = driver
        self._closed = False
        self._cache = cache or MetadataCache(DEFAULT_METADATA_BYTES)
        self._map = ResolvedMap(self.layers(), self._cache)
        self._cache.hold_at_least(len(self._map.layers) * _TABLES_PER_LAYER)
        self._readers = tuple(storage.readv_nowait for storage in self._map.storages)
        self._writers = tuple(storage.writev_nowait for storage in self._map.storages)
        self._page_cache_fds = tuple(storage.page_cache_fd for storage in self._map.storages)
        self._splice_fds = tuple(storage.splice_fd for storage in self._map.storages)
        # The fast path's own copies: an attribute less on each request.
        self._namespace = self._map.namespace
        self._chunk_bits = self._map.chunk_bits
        self._granule_bits = self._map.granule_bits
        self._granule = self._map.granule
        self._read_parallelism = 8

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.driver!r})"

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

    @property
    def is_writable(self) -> bool:
        """Whether the image was opened for writing; the same as `writable`."""
        return self.driver.writable

    @property
    def memory_alignment(self) -> int:
        """Buffers at multiples of this address need no copy in any layer (bytes; see `IoBuffer`).

        Any buffer may be given all the same.
        """
        return max(storage.memory_alignment for storage in self.storages())

    @property
    def request_alignment(self) -> int:
        """Requests whose offset and length are multiples of this need no copy (bytes).

        Any offset and length may be given all the same.
        """
        return max(storage.request_alignment for storage in self.storages())

    @property
    def read_parallelism(self) -> int:
        """How many storage requests of one read are in flight at the same time: 8 at first.

        Raises:
            OutOfRangeError: It is set to less than 1.
            WrongTypeError: It is set to something else than an int.
        """
        return self._read_parallelism

    @read_parallelism.setter
    def read_parallelism(self, requests: int) -> None:
        self._read_parallelism = checked_parallelism(requests)

    def dependencies(self) -> Dependencies:
        """Every layer and every storage that the image uses, those of the chain below included."""
        return Dependencies(tuple(self.layers()), self.storages())

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

    def cached_ranges(self, guest_offset: int, length: int) -> list[FileRange] | None:
        """Where in files the bytes of a range are, if the page cache has all. A plain function.

        The range must lie inside the image; this method does not check it.

        Returns:
            At most 64 places, one after the other, good until anything else runs; None: read it.
        """
        return self._file_ranges(guest_offset, length, self._page_cache_fds)

    def file_ranges(self, guest_offset: int, length: int) -> list[FileRange] | None:
        """As `cached_ranges`, whether the page cache has the bytes or not. A plain function.

        Returns:
            Places that are good until the image is written to or closed; None: read it.
        """
        return self._file_ranges(guest_offset, length, self._splice_fds)

    def likely_ranges(self, guest_offset: int, length: int) -> list[FileRange] | None:
        """As `file_ranges`, if the page cache has those at the end. A plain function.

        For who reads in order, and has found all in the page cache so far: where that is over, it
        is over at the end first.
        """
        ranges = self.file_ranges(guest_offset, length)
        if ranges is None:
            return None
        last = ranges[-1][2]
        return ranges if self.cached_ranges(guest_offset + length - last, last) else None

    def _file_ranges(
        self, guest_offset: int, length: int, fds: tuple[Callable[[int, int], int], ...]
    ) -> list[FileRange] | None:
        try:
            places: Sequence[tuple[int, int, int]] | None = self._map.places(guest_offset, length)
            if places is None:
                places = self._map.runs(guest_offset, length)
        except NotCached:
            return None
        if len(places) > _MOST_FILE_RANGES:
            return None
        ranges = []
        for code, place, part in places:
            if code >= _FIRST_CODE:
                return None
            fd = fds[code](place, part)
            if fd < 0:
                return None
            ranges.append((fd, place, part))
        return ranges

    # --- lending --------------------------------------------------------------------------------

    def lend_nowait(self, guest_offset: int, length: int) -> list[Buffer] | None:
        """The bytes of a range as they lie in memory, if it is compressed. A plain function.

        The range must lie inside the image; this method does not check it.

        Returns:
            Buffers that never change, one after the other; an empty list if the bytes must be
            inflated first (ask `lend`); None if they are not to be had like this: read them.
        """
        lender = self._lender(guest_offset, length)
        return None if lender is None else lender.lend_nowait(guest_offset, length)

    async def lend(self, guest_offset: int, length: int) -> list[Buffer] | None:
        """As `lend_nowait`, once the bytes are in memory.

        Raises:
            As `read`.
        """
        self._check_range(guest_offset, length)
        lender = self._lender(guest_offset, length)
        if lender is None:
            return None
        token = self.driver.begin_io()
        try:
            return await lender.lend(guest_offset, length)
        finally:
            self.driver.end_io(token)

    def _lender(self, guest_offset: int, length: int) -> FormatDriver | None:
        """The layer that has the whole range compressed, if that is known."""
        try:
            if self._map.entry(guest_offset) & STORAGE_MASK != SPECIAL:
                return None
            runs = self._map.runs(guest_offset, length)
        except NotCached:
            return None
        return self._map.layers[runs[0].position] if len(runs) == 1 else None

    # --- reading --------------------------------------------------------------------------------

    async def read(self, buffer: Buffer, guest_offset: int) -> None:
        """Fill `buffer` with the bytes from `guest_offset` on.

        Raises:
            OutOfRangeError: The range does not lie inside the image.
            CorruptImageError: A table entry is wrong.
            StorageError: A storage failed.
            ClosedError: The image was closed.
            WrongTypeError: `buffer` is no writable buffer, or the offset no int.
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
            raise WrongTypeError("a read needs writable buffers", filename=self.filename)
        token = self.driver.begin_io()
        try:
            await self._read_runs(await self._runs(guest_offset, length), views, guest_offset)
        finally:
            self.driver.end_io(token)

    async def _runs(self, guest_offset: int, length: int) -> list[Run]:
        # Each round brings in one table. More rounds than there can be tables mean that the cache
        # is too small for all of them together: then layer by layer.
        for _ in range(len(self._map.layers) * (2 + length // 4096)):
            try:
                return self._map.runs(guest_offset, length)
            except NotCached as missing:
                await missing.driver.get_mapping(missing.guest_offset, 1)
        return [Run(MIXED, 0, length)]

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

        await run_parallel(work, min(self._read_parallelism, len(waiting)))

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
                case EofMapping():
                    # The disk has become smaller since the read was let in.
                    fill_views(views)
                    return
                case _:
                    fill_views(parts)
            guest_offset += mapping.length
            length -= mapping.length

    # --- mappings -------------------------------------------------------------------------------

    async def get_shallow_mapping(self, guest_offset: int, max_length: int) -> ShallowMapping:
        """Where the top layer says the bytes from `guest_offset` on are.

        Raises:
            OutOfRangeError: A negative offset, or a `max_length` below 1.
            CorruptImageError: A table entry is wrong.
            StorageError: A table cannot be read.
            ClosedError: The image was closed.
            WrongTypeError: An argument is no int.
        """
        self._check_open()
        check_types(guest_offset, max_length)
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
    ) -> AsyncGenerator[tuple[int, Mapping], None]:
        """Walk a range: each guest offset with its mapping, like neighbours merged.

        Args:
            guest_offset: Where to begin.
            length: Bytes; None: up to the end.

        Whoever leaves the loop early closes the iterator (`contextlib.aclosing`).

        Raises:
            OutOfRangeError: The range does not lie inside the image.
            As `get_shallow_mapping`.
        """
        check_types(guest_offset, 0 if length is None else length)
        length = self.size() - guest_offset if length is None else length
        self._check_range(guest_offset, length)
        end = guest_offset + length
        start = guest_offset
        held: Mapping | None = None
        while guest_offset < end:
            mapping = await self._mapping(guest_offset, end - guest_offset)
            if isinstance(mapping, EofMapping):
                break  # the disk has become smaller meanwhile
            merged = merge_mappings(held, mapping)
            if merged is None:
                if held is not None:
                    yield start, held
                start, held = guest_offset, mapping
            else:
                held = merged
            guest_offset += mapping.length
        if held is not None:
            yield start, held

    # --- checks ---------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the image is closed", filename=self.filename)

    def _check_range(self, guest_offset: int, length: int) -> None:
        self._check_open()
        check_types(guest_offset, length)
        if guest_offset < 0 or length < 0 or guest_offset + length > self.size():
            raise OutOfRangeError(
                f"{length} bytes at {guest_offset} do not lie in the disk's {self.size()}",
                filename=self.filename,
            )


def check_types(guest_offset: int, length: int) -> None:
    """Raise WrongTypeError for what is no int."""
    # A NumPy integer, say, would overflow in the shifts that follow.
    if not isinstance(guest_offset, int) or not isinstance(length, int):
        raise WrongTypeError(f"an offset or length is no int: {guest_offset!r}, {length!r}")


def checked_parallelism(requests: int) -> int:
    """A number of requests, if it is one (else WrongTypeError, OutOfRangeError)."""
    if not isinstance(requests, int):
        raise WrongTypeError(f"{requests!r} is no number of requests")
    if requests < 1:
        raise OutOfRangeError(f"{requests} requests at the same time")
    return requests
