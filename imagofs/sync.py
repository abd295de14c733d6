"""SyncFormatAccess: the blocking face of FormatAccess, for programs without an event loop.

One thread runs a trio loop for all images of the process. It starts with the first image and ends
with the process: it outlives the main thread until every image is flushed.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self, TypeVar

import trio

from .access import FormatAccess
from .gate import ImplicitOpenGate
from .mapping import Mapping, RawMapping, ShallowMapping
from .opening import open_image
from .storage.base import PreallocateMode, Storage, StorageOpenOptions

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .vectors import IoVector

__all__ = ["SyncFormatAccess"]

T = TypeVar("T")


class _Loop:
    """The thread with the trio loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread: threading.Thread | None = None
        #: Open images. The loop keeps them until they are closed.
        self.images: set[FormatAccess] = set()

    def run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Call an async function in the loop and wait for what it returns."""
        return trio.from_thread.run(function, *args, trio_token=self._started())

    def run_soon(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Call an async function in the loop without waiting."""
        token = self._started()
        token.run_sync_soon(lambda: trio.lowlevel.spawn_system_task(function, *args))

    def may_wait(self) -> bool:
        """Whether the calling thread may wait for the loop: not the loop's own, nor its helpers."""
        thread = threading.current_thread()
        return thread is not self._thread and not thread.name.startswith("Trio")

    def _started(self) -> trio.lowlevel.TrioToken:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
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
            try:
                await image.close()
            except Exception as exc:
                os.write(2, f"imagofs: {exc}\n".encode(errors="replace"))

    def forget_after_fork(self) -> None:
        """The thread does not exist in a forked child, and the images are the parent's."""
        self.__init__()  # type: ignore[misc]


_loop = _Loop()
os.register_at_fork(after_in_child=_loop.forget_after_fork)


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
    if image.closed or process != os.getpid():
        return
    if _loop.may_wait():
        _loop.run(_close_dropped, image)
    else:
        _loop.run_soon(_close_dropped, image)


class SyncFormatAccess:
    """A disk image with its chain, as one flat range of bytes: FormatAccess with blocking calls.

    Usable from any thread, by several at once; not from within an async function. It flushes when
    it is closed, when it is dropped, and when the interpreter exits. Every method has the
    arguments and the errors of its namesake in `FormatAccess`.

    Args:
        access: The image, which belongs to this object from now on. It must not be in use by
            another trio loop.
    """

    def __init__(self, access: FormatAccess) -> None:
        self._access = access
        _loop.images.add(access)
        self._finalizer = weakref.finalize(self, _dropped, access, os.getpid())
        # At exit the loop itself closes what is open.
        self._finalizer.atexit = False

    @classmethod
    def open(
        cls,
        image: str | os.PathLike[str] | Storage,
        *,
        writable: bool = False,
        format: str | None = None,
        gate: ImplicitOpenGate | None = None,
        storage_options: StorageOpenOptions | None = None,
        lock: bool = False,
        snapshot: str | None = None,
        metadata_bytes: int | None = None,
        inflated_bytes: int | None = None,
    ) -> Self:
        """Open an image with its chain; see `open_image`."""

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

    # --- data ---------------------------------------------------------------------------------

    def read(self, buffer: Buffer, guest_offset: int) -> None:
        """See `FormatAccess.read`."""
        _loop.run(self._access.read, buffer, guest_offset)

    def readv(self, buffers: Iterable[Buffer] | IoVector, guest_offset: int) -> None:
        """See `FormatAccess.readv`."""
        _loop.run(self._access.readv, buffers, guest_offset)

    def write(self, buffer: Buffer, guest_offset: int) -> None:
        """See `FormatAccess.write`."""
        _loop.run(self._access.write, buffer, guest_offset)

    def writev(self, buffers: Iterable[Buffer] | IoVector, guest_offset: int) -> None:
        """See `FormatAccess.writev`."""
        _loop.run(self._access.writev, buffers, guest_offset)

    def write_zeroes(self, guest_offset: int, length: int, *, allocate: bool = False) -> None:
        """See `FormatAccess.write_zeroes`."""

        async def write_zeroes() -> None:
            await self._access.write_zeroes(guest_offset, length, allocate=allocate)

        _loop.run(write_zeroes)

    def discard_to_any(self, guest_offset: int, length: int) -> None:
        """See `FormatAccess.discard_to_any`."""
        _loop.run(self._access.discard_to_any, guest_offset, length)

    def discard_to_zero(self, guest_offset: int, length: int) -> None:
        """See `FormatAccess.discard_to_zero`."""
        _loop.run(self._access.discard_to_zero, guest_offset, length)

    def discard_to_backing(self, guest_offset: int, length: int) -> None:
        """See `FormatAccess.discard_to_backing`."""
        _loop.run(self._access.discard_to_backing, guest_offset, length)

    def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        """See `FormatAccess.resize`."""
        _loop.run(self._access.resize, size, preallocate)

    # --- mappings -----------------------------------------------------------------------------

    def get_mapping(self, guest_offset: int, max_length: int) -> Mapping:
        """See `FormatAccess.get_mapping`."""
        return _loop.run(self._access.get_mapping, guest_offset, max_length)

    def get_shallow_mapping(self, guest_offset: int, max_length: int) -> ShallowMapping:
        """See `FormatAccess.get_shallow_mapping`."""
        return _loop.run(self._access.get_shallow_mapping, guest_offset, max_length)

    def map(
        self, guest_offset: int = 0, length: int | None = None
    ) -> Iterator[tuple[int, Mapping]]:
        """See `FormatAccess.map`; each step is a call of its own."""
        steps = self._access.map(guest_offset, length)

        async def step() -> tuple[int, Mapping] | None:
            return await anext(steps, None)

        while (found := _loop.run(step)) is not None:
            yield found

    def ensure_data_mapping(
        self, guest_offset: int, length: int, *, overwrite: bool = False
    ) -> RawMapping:
        """See `FormatAccess.ensure_data_mapping`."""

        async def ensure() -> RawMapping:
            return await self._access.ensure_data_mapping(guest_offset, length, overwrite=overwrite)

        return _loop.run(ensure)

    def ensure_zero_mapping(self, guest_offset: int, length: int) -> None:
        """See `FormatAccess.ensure_zero_mapping`."""
        _loop.run(self._access.ensure_zero_mapping, guest_offset, length)

    # --- durability ---------------------------------------------------------------------------

    def flush(self) -> None:
        """See `FormatAccess.flush`."""
        _loop.run(self._access.flush)

    def sync(self) -> None:
        """See `FormatAccess.sync`."""
        _loop.run(self._access.sync)

    def invalidate_cache(self) -> None:
        """See `FormatAccess.invalidate_cache`."""
        _loop.run(self._access.invalidate_cache)

    def close(self) -> None:
        """See `FormatAccess.close`. Closing twice is fine."""
        self._finalizer.detach()
        if not self._access.closed:
            _loop.run(_close, self._access)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
