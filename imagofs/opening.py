"""Opening images, and the only place that opens what an image refers to.

Rules that live here:

- Nothing that an image refers to is opened unless the caller's gate lets it pass.
- A chain has no loop and at most `MAX_CHAIN_DEPTH` layers; everything below the top is opened
  read-only.
"""

from __future__ import annotations

import enum
import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import TYPE_CHECKING, Literal

import trio

from .arguments import check_size, check_type, path_of
from .caching import MetadataCache
from .errors import (
    ChainError,
    FormatError,
    GateDeniedError,
    ImagofsError,
    ReadOnlyError,
    UnsupportedError,
    WrongTypeError,
)
from .format import FORMATS, PROBE_BYTES, probe_format
from .gate import ImplicitOpenGate, ImplicitOpenRequest, Role
from .inflating import InflatedCache
from .storage.annotated import AnnotatedStorage
from .storage.base import Storage, StorageOpenOptions
from .storage.file import FileStorage

if TYPE_CHECKING:
    from .access import FormatAccess

__all__ = ["FROM_HEADER", "MAX_CHAIN_DEPTH", "FromHeader", "Locking", "OpenContext", "open_image"]

log = logging.getLogger(__name__)

#: Whether qemu's image locks are taken; "auto": where the file system has them.
Locking = bool | Literal["auto"]

MAX_CHAIN_DEPTH = 200


class FromHeader(enum.Enum):
    """The type of `FROM_HEADER`."""

    FROM_HEADER = "from header"


#: For parameters like `backing`: do what the image's header says (None: without it).
FROM_HEADER = FromHeader.FROM_HEADER


class _NoGate(ImplicitOpenGate):
    """What stands in when the caller gave no gate: refuses and says how to allow it."""

    def check(self, request: ImplicitOpenRequest) -> None:
        raise GateDeniedError(
            f"refers to the {request.role.value} {request.name!r}; pass "
            f"gate=PermissiveImplicitOpenGate() or AllowDirectories([...]) to let it be opened",
            filename=request.image,
        )


@dataclass(frozen=True, slots=True)
class OpenContext:
    """What the layers of one chain are opened with. Drivers ask it for what they refer to.

    Attributes:
        gate: Decides on every file that an image refers to.
        options: How files are opened; `writable` counts for the top layer only.
        lock: Take qemu's image locks on every file; "auto": where the file system has such locks.
        cache: The chain's metadata cache.
        inflated: The chain's cache of inflated clusters.
        image: The name of the image that refers to what is opened.
        base: Its storage, which relative names start from.
        depth: Layers above the one that is opened.
        seen: (device, inode) of every file that is open in the chain so far.
    """

    gate: ImplicitOpenGate = field(default_factory=_NoGate)
    options: StorageOpenOptions = field(default_factory=StorageOpenOptions)
    lock: Locking = False
    cache: MetadataCache = field(default_factory=MetadataCache)
    inflated: InflatedCache = field(default_factory=InflatedCache)
    image: str = ""
    base: Storage | None = None
    depth: int = 0
    seen: frozenset[tuple[int, int]] = frozenset()

    @classmethod
    def of(
        cls,
        *,
        gate: ImplicitOpenGate | None = None,
        options: StorageOpenOptions | None = None,
        lock: Locking = False,
        metadata_bytes: int | None = None,
        inflated_bytes: int | None = None,
    ) -> OpenContext:
        """A new chain's context; None stands for each default.

        Raises:
            WrongTypeError: An argument of another type.
            OutOfRangeError: A cache of less than no bytes.
        """
        check_type("the gate", gate, ImplicitOpenGate, NoneType)
        check_type("storage_options", options, StorageOpenOptions, NoneType)
        if lock not in (True, False, "auto"):
            raise WrongTypeError(f"lock is True, False or 'auto', not {lock!r}")
        check_size("metadata_bytes", 0 if metadata_bytes is None else metadata_bytes)
        check_size("inflated_bytes", 0 if inflated_bytes is None else inflated_bytes)
        return cls(
            gate=gate or _NoGate(),
            options=options or StorageOpenOptions(),
            lock=lock,
            cache=MetadataCache(*(() if metadata_bytes is None else (metadata_bytes,))),
            inflated=InflatedCache(*(() if inflated_bytes is None else (inflated_bytes,))),
        )

    def within(self, storage: Storage) -> OpenContext:
        """The context of what the image in `storage` refers to."""
        return replace(
            self,
            image=storage.filename or "(unnamed)",
            base=storage,
            seen=self.seen | _identity(storage),
        )

    def below(self, data_file: Storage) -> OpenContext:
        """The context of the backing file of an image whose `data_file` is written to.

        That file may be nothing else in the chain: what is below the top never changes.
        """
        return replace(self, seen=self.seen | _identity(data_file))

    async def open_backing(self, name: str, format_name: str | None) -> FormatAccess:
        """Open the backing file `name`, read-only; its format is probed if none is given.

        Raises:
            GateDeniedError: The gate refuses it.
            ChainError: It cannot be opened, or the chain has a loop or is too deep.
        """
        if self.depth + 1 >= MAX_CHAIN_DEPTH:
            raise ChainError(
                f"the chain of backing files is deeper than {MAX_CHAIN_DEPTH}", filename=self.image
            )
        if format_name is not None and format_name not in FORMATS:
            raise UnsupportedError(
                f"its backing file {name!r} has the format {format_name!r}, which imagofs does "
                f"not know",
                filename=self.image,
            )
        storage = await self._open(name, Role.BACKING, format_name, writable=False)
        below = replace(self, depth=self.depth + 1)
        try:
            return await _open_layer(storage, below, format_name, writable=False)
        except BaseException:
            await _close(storage)
            raise

    async def open_extent(self, name: str, *, writable: bool, role: Role = Role.EXTENT) -> Storage:
        """Open a file with guest data that has no format of its own.

        Raises:
            GateDeniedError: The gate refuses it.
            ChainError: It cannot be opened, or is open in the chain already.
        """
        return await self._open(name, role, None, writable=writable)

    async def open_data_file(self, name: str, *, writable: bool) -> Storage:
        """Open an external data file. Raises as `open_extent`."""
        return await self._open(name, Role.DATA, None, writable=writable)

    async def _open(
        self, name: str, role: Role, format_name: str | None, *, writable: bool
    ) -> Storage:
        path = self._resolve(name, role)
        self.gate.check(
            ImplicitOpenRequest(
                image=self.image,
                name=name,
                path=path,
                role=role,
                format=format_name,
                format_guessed=role is Role.BACKING and format_name is None,
                writable=writable,
                depth=self.depth + 1,
            )
        )
        try:
            options = replace(self.options, writable=writable)
            storage = await _open_file(path, options, self.lock, where=path)
        except ImagofsError as exc:
            error = ChainError(
                f"cannot open its {role.value} {name!r} ({path}): {exc.message}",
                filename=self.image,
            )
            raise error from exc
        if _identity(storage) & self.seen:
            await _close(storage)
            raise ChainError(
                f"its {role.value} {name!r} ({path}) is open in the chain already: a loop",
                filename=self.image,
            )
        return storage

    def _resolve(self, name: str, role: Role) -> str:
        if "\0" in name or not name:
            raise FormatError(f"its {role.value} has the name {name!r}", filename=self.image)
        # What stands before a colon, with no slash before it, is a protocol to qemu.
        if match := re.match(r"([A-Za-z0-9+.-]+):", name):
            if match[1] != "file":
                raise UnsupportedError(
                    f"its {role.value} {name[:200]!r} is no file: {match[1]}: is not supported",
                    filename=self.image,
                )
            name = name.removeprefix("file:")
        assert self.base is not None
        return os.path.realpath(self.base.resolve_relative_path(name))


async def open_image(
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
) -> FormatAccess:
    """Open an image with its chain of backing files.

    Args:
        image: A path, or an open storage, which the image owns from then on.
        writable: Open the top layer for writing; it is read-only otherwise, and so is all below.
        format: "qcow2", "raw" or "vmdk"; None: probed, raw where nothing else matches. A raw
            image that is opened for writing must be named as such: a guest could otherwise write
            a qcow2 header into it that names a file of the host.
        gate: Decides on the files that the image refers to; None: refuse with the way to allow it.
        storage_options: How files are opened; `writable` of it is not looked at.
        lock: Take the locks that qemu takes, on every file of the chain; "auto": go on, with a
            warning, where the file system has no such locks.
        snapshot: Name or ID of an internal snapshot to read instead of the current state.
        metadata_bytes: Bound of the cache of metadata tables; None: 32 MiB.
        inflated_bytes: Bound of the cache of inflated clusters; None: 64 MiB.

    Raises:
        FormatError: Not an image of the format, truncated, or with fields that cannot be right.
        UnsupportedError: It needs something that imagofs does not offer; so for encryption.
        ChainError: Something that it refers to cannot be opened.
        GateDeniedError: The gate refuses a file.
        LockedError: Another process uses a file in a way that excludes this.
        ReadOnlyError: It should be writable, and the storage is open read-only.
        StorageError: The file cannot be opened or read.
        WrongTypeError: An argument of another type: `image` is no path and no storage, say.
    """
    context = OpenContext.of(
        gate=gate,
        options=storage_options,
        lock=lock,
        metadata_bytes=metadata_bytes,
        inflated_bytes=inflated_bytes,
    )
    check_type("the snapshot", snapshot, str, NoneType)
    if format is not None and format not in FORMATS:
        raise UnsupportedError(
            f"the format {format!r} is not known; known are {', '.join(FORMATS)}",
            filename=None if isinstance(image, Storage) else _path(image),
        )
    storage = await open_storage(image, writable=writable, options=context.options, lock=lock)
    try:
        return await _open_layer(storage, context, format, writable=writable, snapshot=snapshot)
    except BaseException:
        await _close(storage)
        raise


async def open_storage(
    image: str | os.PathLike[str] | Storage,
    *,
    writable: bool = False,
    options: StorageOpenOptions | None = None,
    lock: Locking = False,
) -> Storage:
    """A path as a storage; a storage is passed through, locked if that is asked for.

    Raises:
        As `open_image`. A storage is closed then.
    """
    if isinstance(image, Storage):
        try:
            if writable and not image.writable:
                raise ReadOnlyError("the storage is open read-only", filename=image.filename)
            _lock(image, writable, lock)
        except BaseException:
            await _close(image)
            raise
        return image
    options = replace(options or StorageOpenOptions(), writable=writable)
    return await _open_file(_path(image), options, lock)


@asynccontextmanager
async def layer_storage(
    image: str | os.PathLike[str] | Storage,
    *,
    writable: bool,
    options: StorageOpenOptions | None,
    gate: ImplicitOpenGate | None,
    lock: Locking,
) -> AsyncIterator[tuple[Storage, OpenContext]]:
    """For a driver's `open`: the image's storage, and the context of what the image refers to.

    The storage is closed if the block fails.

    Raises:
        As `open_image`.
    """
    context = OpenContext.of(gate=gate, options=options, lock=lock)
    storage = await open_storage(image, writable=writable, options=context.options, lock=lock)
    try:
        yield storage, context.within(storage)
    except BaseException:
        await _close(storage)
        raise


def _path(image: str | os.PathLike[str]) -> str:
    check_type("the image", image, str, os.PathLike, Storage)
    return path_of(image)


async def _open_file(
    path: str, options: StorageOpenOptions, lock: Locking, *, where: str | None = None
) -> FileStorage:
    """Open a file; with `where`, only if that is its path without symbolic links."""
    storage = await FileStorage.open(path, options)
    try:
        # A gate has judged `where`: a symbolic link may have been put into that path since.
        if where is not None and os.readlink(f"/proc/self/fd/{storage.fileno()}") != where:
            raise ChainError("it was replaced while it was opened", filename=path)
        _lock(storage, options.writable, lock)
    except BaseException:
        await _close(storage)
        raise
    return storage


def _lock(storage: Storage, writable: bool, lock: Locking) -> None:
    """Take qemu's locks on a storage's file, if it has one and that is asked for."""
    file = _file_of(storage)
    if file is None or not lock:
        return
    try:
        file.lock(writable=writable)
    except UnsupportedError as error:
        if lock != "auto":
            raise
        log.warning("%s; going on without locks (lock=off says so beforehand)", error)


async def _open_layer(
    storage: Storage,
    context: OpenContext,
    format_name: str | None,
    *,
    writable: bool,
    snapshot: str | None = None,
) -> FormatAccess:
    from .access import FormatAccess

    if format_name is None:
        first = await storage.read_table(min(PROBE_BYTES, storage.size()), 0)
        format_name = probe_format(bytes(first))
        if format_name == "raw" and writable:
            raise FormatError(
                "no image format was recognised, and writing to a disk that is only guessed to be "
                "raw could change what it is taken for: add format=raw if it is raw "
                "('imagofs resize': -f raw)",
                filename=storage.filename,
            )
    open_format = FORMATS[format_name].opener()
    driver = await open_format(
        storage, context=context.within(storage), writable=writable, snapshot=snapshot
    )
    return FormatAccess(driver, cache=context.cache)


async def _close(storage: Storage) -> None:
    with trio.CancelScope(shield=True):
        await storage.close()


def _identity(storage: Storage) -> frozenset[tuple[int, int]]:
    """Device and inode of a storage's file; empty for what is no file."""
    file = _file_of(storage)
    if file is None:
        return frozenset()
    status = os.fstat(file.fileno())
    return frozenset({(status.st_dev, status.st_ino)})


def _file_of(storage: Storage) -> FileStorage | None:
    """The file that a storage is, tagged or not."""
    while isinstance(storage, AnnotatedStorage):
        storage = storage.inner
    return storage if isinstance(storage, FileStorage) else None
