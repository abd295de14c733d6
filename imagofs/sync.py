"""SyncFormatAccess: the blocking face of FormatAccess, for programs without an event loop.

One thread runs a trio loop for all images of the process. It starts with the first image and ends
with the process: it outlives the main thread until every image is flushed.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self, TypeVar

import trio

from .access import FormatAccess
from .errors import ClosedError, UnsupportedError
from .format.base import FormatDriver
from .gate import ImplicitOpenGate
from .mapping import Mapping, RawMapping, ShallowMapping
from .opening import Locking, open_image
from .reading import Dependencies, check_types
from .storage.base import PreallocateMode, Storage, StorageOpenOptions

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .vectors import IoVector

__all__ = ["SyncFormatAccess"]

T = TypeVar("T")

_MAP_STEPS = 256  # of a map that are looked up in one call


class _Loop:
    """The thread with the trio loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread: threading.Thread | None = None
        #: Open images. The loop keeps them until they are closed.
        self.images: set[FormatAccess] = set()

    def run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Call an async function in the loop and wait for what it returns.

        Raises:
            UnsupportedError: The caller is itself part of a trio loop.
            ClosedError: The interpreter exits.
        """
        if _in_trio_loop():
            raise UnsupportedError("a blocking call in an async function; await FormatAccess there")
        token = self.started()
        try:
            return trio.from_thread.run(function, *args, trio_token=token)
        except trio.RunFinishedError as error:
            raise ClosedError("the interpreter exits, every image was closed") from error

    def run_soon(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Call an async function in the loop without waiting."""
        token = self.started()
        token.run_sync_soon(lambda: trio.lowlevel.spawn_system_task(function, *args))

    def started(self) -> trio.lowlevel.TrioToken:
        """See that the thread runs.

        Raises:
            ClosedError: The interpreter exits.
        """
        # No lock where none is needed: the garbage collector may call this at any moment.
        if self._token is not None and self._thread is not None and self._thread.is_alive():
            return self._token
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                if not threading.main_thread().is_alive():
                    raise ClosedError("the interpreter exits")
                ready = threading.Event()
                self._thread = threading.Thread(
                    target=trio.run, args=(self._main, ready), name="imagofs", daemon=False
                )
                self._thread.start()
                ready.wait()
            assert self._token is not None
            return self._token

    async def _main(self, ready: threading.Event) -> None:
        self._token = trio.lowlevel.current_trio_token()
        ready.set()
        # The interpreter waits for this thread after the main one has ended: the time to flush.
        await trio.to_thread.run_sync(threading.main_thread().join, abandon_on_cancel=True)
        for image in list(self.images):
            await _close_dropped(image)

    def forget_after_fork(self) -> None:
        """The thread does not exist in a forked child, and the images are the parent's."""
        self.__init__()  # type: ignore[misc]


_loop = _Loop()
os.register_at_fork(after_in_child=_loop.forget_after_fork)


def _in_trio_loop() -> bool:
    try:
        trio.lowlevel.current_trio_token()
    except RuntimeError:
        return False
    return True


async def _close(image: FormatAccess) -> None:
    try:
        await image.close()
    finally:
        _loop.images.discard(image)


async def _close_dropped(image: FormatAccess) -> None:
    """Close an image that nobody refers to any more; there is nobody to tell of an error either."""
    try:
        await _close(image)
    except Exception as exc:
        os.write(2, f"imagofs: {exc}\n".encode(errors="replace"))


def _dropped(image: FormatAccess, process: int) -> None:
    """What the garbage collector calls, in whatever thread it is at work."""
    if image.closed or process != os.getpid():
        return
    # Neither a loop's thread nor its helpers wait: the loop could be waiting for them.
    if _in_trio_loop() or threading.current_thread().name.startswith("Trio"):
        _loop.run_soon(_close_dropped, image)
    else:
        _loop.run(_close_dropped, image)


class SyncFormatAccess:
    """A disk image with its chain, as one flat range of bytes: FormatAccess with blocking calls.

    Usable from any thread, by several at once; not from within an async function. It flushes when
    it is closed, when it is dropped, and when the interpreter exits (not when it is killed, nor
    after `os._exit`). A child made by `os.fork` cannot use it: it is the parent's.

    Every method has the arguments of its namesake in `FormatAccess`, and its errors. Besides:

    - `ClosedError` in a forked child, and once the interpreter exits,
    - `UnsupportedError` in a thread that runs a trio loop.

    Args:
        access: The image, or its driver. It belongs to this object from now on, and must not be in
            use by another trio loop.

    Raises:
        WrongTypeError: `access` is neither.
    """

    def __init__(self, access: FormatAccess | FormatDriver) -> None:
        self._access = access if isinstance(access, FormatAccess) else FormatAccess(access)
        self._process = os.getpid()
        _loop.started()
        _loop.images.add(self._access)
        self._finalizer = weakref.finalize(self, _dropped, self._access, self._process)
        # At exit the loop itself closes what is open.
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        return f"SyncFormatAccess({self._access.driver!r})"

    def _run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        if self._process != os.getpid():
            raise ClosedError(
                "the image is open in the parent process; open it again", filename=self.filename
            )
        if self._access.closed:
            raise ClosedError("the image is closed", filename=self.filename)
        return _loop.run(function, *args)

    @classmethod
    def open(
        cls,
        image: str | os.PathLike[str] | Storage,
        *,
        writable: bool = False,
        format: str | None = None,
        gate: ImplicitOpenGate | None = None,
        storage_options: StorageOpenOptions | None = None,
        lock: Locking = False,
        snapshot: str | None = None,
        metadata_bytes: int | None = None,
        inflated_bytes: int | None = None,
    ) -> Self:
        """Open an image with its chain; arguments and errors are those of `open_image`."""

        async def open_it() -> FormatAccess:
            return await open_image(
                image,
                writable=writable,
                format=format,
                gate=gate,
                storage_options=storage_options,
                lock=lock,
                snapshot=snapshot,
                metadata_bytes=metadata_bytes,
                inflated_bytes=inflated_bytes,
            )

        return cls(_loop.run(open_it))

    # --- facts --------------------------------------------------------------------------------

    @property
    def access(self) -> FormatAccess:
        """The async image behind this one. Its coroutines belong to this object's loop."""
        return self._access

    def size(self) -> int:
        """The disk's size in bytes."""
        return self._access.size()

    @property
    def writable(self) -> bool:
        """Whether the image was opened for writing."""
        return self._access.writable

    @property
    def is_writable(self) -> bool:
        """Whether the image was opened for writing; the same as `writable`."""
        return self._access.writable

    @property
    def format_name(self) -> str:
        """The top layer's format."""
        return self._access.format_name

    @property
    def filename(self) -> str | None:
        """The top layer's file name."""
        return self._access.filename

    @property
    def closed(self) -> bool:
        """Whether the image was closed."""
        return self._access.closed

    @property
    def memory_alignment(self) -> int:
        """See `FormatAccess.memory_alignment`."""
        return self._access.memory_alignment

    @property
    def request_alignment(self) -> int:
        """See `FormatAccess.request_alignment`."""
        return self._access.request_alignment

    @property
    def read_parallelism(self) -> int:
        """See `FormatAccess.read_parallelism`."""
        return self._access.read_parallelism

    @read_parallelism.setter
    def read_parallelism(self, requests: int) -> None:
        self._access.read_parallelism = requests

    @property
    def write_parallelism(self) -> int:
        """See `FormatAccess.write_parallelism`."""
        return self._access.write_parallelism

    @write_parallelism.setter
    def write_parallelism(self, requests: int) -> None:
        self._access.write_parallelism = requests

    def layers(self) -> list[FormatDriver]:
        """See `FormatAccess.layers`."""
        return self._access.layers()

    def storages(self) -> tuple[Storage, ...]:
        """See `FormatAccess.storages`."""
        return self._access.storages()

    def dependencies(self) -> Dependencies:
        """See `FormatAccess.dependencies`."""
        return self._access.dependencies()

    def allocated_bytes(self) -> int:
        """See `FormatAccess.allocated_bytes`."""
        return self._access.allocated_bytes()

    # --- data ---------------------------------------------------------------------------------

    def read(self, buffer: Buffer, guest_offset: int) -> None:
        """See `FormatAccess.read`."""
        self._run(self._access.read, buffer, guest_offset)

    def readv(self, buffers: Iterable[Buffer] | IoVector, guest_offset: int) -> None:
        """See `FormatAccess.readv`."""
        self._run(self._access.readv, buffers, guest_offset)

    def write(self, buffer: Buffer, guest_offset: int) -> None:
        """See `FormatAccess.write`."""
        self._run(self._access.write, buffer, guest_offset)

    def writev(self, buffers: Iterable[Buffer] | IoVector, guest_offset: int) -> None:
        """See `FormatAccess.writev`."""
        self._run(self._access.writev, buffers, guest_offset)

    def write_zeroes(self, guest_offset: int, length: int, *, allocate: bool = False) -> None:
        """See `FormatAccess.write_zeroes`."""

        async def write_zeroes() -> None:
            await self._access.write_zeroes(guest_offset, length, allocate=allocate)

        self._run(write_zeroes)

    def discard_to_any(self, guest_offset: int, length: int) -> None:
        """See `FormatAccess.discard_to_any`."""
        self._run(self._access.discard_to_any, guest_offset, length)

    def discard_to_zero(self, guest_offset: int, length: int) -> None:
        """See `FormatAccess.discard_to_zero`."""
        self._run(self._access.discard_to_zero, guest_offset, length)

    def discard_to_backing(self, guest_offset: int, length: int) -> None:
        """See `FormatAccess.discard_to_backing`."""
        self._run(self._access.discard_to_backing, guest_offset, length)

    def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        """See `FormatAccess.resize`."""
        self._run(self._access.resize, size, preallocate)

    # --- mappings -----------------------------------------------------------------------------

    def get_mapping(self, guest_offset: int, max_length: int) -> Mapping:
        """See `FormatAccess.get_mapping`."""
        return self._run(self._access.get_mapping, guest_offset, max_length)

    def get_shallow_mapping(self, guest_offset: int, max_length: int) -> ShallowMapping:
        """See `FormatAccess.get_shallow_mapping`."""
        return self._run(self._access.get_shallow_mapping, guest_offset, max_length)

    def map(
        self, guest_offset: int = 0, length: int | None = None
    ) -> Iterator[tuple[int, Mapping]]:
        """See `FormatAccess.map`; a call fetches some hundred steps."""

        async def some_steps(start: int, end: int) -> list[tuple[int, Mapping]]:
            found = []
            async with aclosing(self._access.map(start, end - start)) as steps:
                async for step in steps:
                    found.append(step)
                    if len(found) == _MAP_STEPS:
                        break
            return found

        check_types(guest_offset, 0 if length is None else length)
        if length is None:
            length = max(0, self.size() - guest_offset)
        end = guest_offset + length
        while True:
            found = self._run(some_steps, guest_offset, end)
            yield from found
            if len(found) < _MAP_STEPS:
                return
            start, mapping = found[-1]
            guest_offset = start + mapping.length

    def ensure_data_mapping(
        self, guest_offset: int, length: int, *, overwrite: bool = False
    ) -> RawMapping:
        """See `FormatAccess.ensure_data_mapping`."""

        async def ensure() -> RawMapping:
            return await self._access.ensure_data_mapping(guest_offset, length, overwrite=overwrite)

        return self._run(ensure)

    def ensure_zero_mapping(self, guest_offset: int, length: int) -> tuple[int, int]:
        """See `FormatAccess.ensure_zero_mapping`."""
        return self._run(self._access.ensure_zero_mapping, guest_offset, length)

    # --- durability ---------------------------------------------------------------------------

    def flush(self) -> None:
        """See `FormatAccess.flush`."""
        self._run(self._access.flush)

    def sync(self) -> None:
        """See `FormatAccess.sync`."""
        self._run(self._access.sync)

    def invalidate_cache(self) -> None:
        """See `FormatAccess.invalidate_cache`."""
        self._run(self._access.invalidate_cache)

    def close(self) -> None:
        """See `FormatAccess.close`. Closing twice is fine, and so is closing in a forked child,
        where it does nothing."""
        if self._process == os.getpid() and not self._access.closed:
            _loop.run(_close, self._access)
        self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
