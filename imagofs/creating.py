"""Creating images.

Nothing is touched before everything is known to be possible. What was created is removed again if
the rest fails or is cancelled, and is no image before it is durable as a whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import trio

from .arguments import check_size, check_type, path_of
from .errors import (
    ChainError,
    ImagofsError,
    OutOfRangeError,
    StorageError,
    UnsupportedError,
)
from .format import FORMATS
from .format.qcow2.creation import Layout, Parameters, plan_layout, write_image
from .gate import ImplicitOpenGate
from .opening import OpenContext
from .storage.base import PreallocateMode, Storage, StorageCreateOptions
from .storage.file import FileStorage
from .storage.null import NullStorage

__all__ = ["CreateOptions", "create_image", "create_qcow2"]

_SECTOR = 512


class CreateOptions(TypedDict, total=False):
    """Keywords of `create_image` and `Qcow2.create`. For a raw image only `preallocate`,
    `overwrite` and `mode` count; others are refused.

    Attributes:
        preallocate: NONE (the default); FORMAT_ALLOCATE: all is mapped, the file stays sparse;
            FULL_ALLOCATE: space is reserved; WRITE_DATA: zeroes are written.
        overwrite: Replace the files that exist. A device needs it.
        mode: Permission bits of new files, before the umask; 0o666.
        gate: Decides whether the backing file may be opened.
        version: 2 or 3 (the default).
        cluster_size: Bytes of a cluster, a power of two from 512 to 2 MiB; 64 KiB.
        refcount_bits: Width of a refcount, a power of two from 1 to 64; 16.
        backing_file: The backing file's name. A relative one counts from the new image.
        backing_format: Its format, which must be given with it.
        check_backing: Open the backing file, to see that it is one (True). With False the image
            may name what does not exist yet; its size must be given then.
        data_file: Name of an external data file, which is created too. A relative one counts
            from the new image.
        data_file_raw: The data file is to show the guest's contents by itself.
        extended_l2: 128-bit L2 entries, with subclusters.
        compression_type: "zlib" (the default) or "zstd".
        lazy_refcounts: Let programs postpone refcounts. imagofs itself never does.
    """

    preallocate: PreallocateMode
    overwrite: bool
    mode: int
    gate: ImplicitOpenGate | None
    version: int
    cluster_size: int
    refcount_bits: int
    backing_file: str | None
    backing_format: str | None
    check_backing: bool
    data_file: str | None
    data_file_raw: bool
    extended_l2: bool
    compression_type: str
    lazy_refcounts: bool


async def create_image(
    image: str | os.PathLike[str] | Storage,
    format: str,
    size: int | None = None,
    **options: Unpack[CreateOptions],
) -> None:
    """Create an image, durably.

    Args:
        image: The file to make, or an empty storage, which stays open and the caller's.
        format: "qcow2" or "raw".
        size: The guest disk's size in bytes, rounded up to a multiple of 512; None: the backing
            file's.
        options: See `CreateOptions`.

    Raises:
        OutOfRangeError: A value that the format cannot have; so a size too large for the clusters.
        UnsupportedError: Options that exclude each other, or a format that cannot be created.
        GateDeniedError: The gate refuses the backing file.
        ChainError: The backing file is the file to be made, or cannot be opened.
        LockedError: A file to overwrite is in use.
        StorageError: A file exists (without `overwrite`), or the system refuses.
        WrongTypeError: An argument of another type.
    """
    if format == "qcow2":
        await create_qcow2(image, size, **options)
    elif format == "raw":
        await _create_raw(image, size, **options)
    else:
        known = "cannot be created" if format in FORMATS else "is not known"
        raise UnsupportedError(
            f"the format {format!r} {known}; use qcow2 or raw", filename=_name(image)
        )


async def create_qcow2(
    image: str | os.PathLike[str] | Storage,
    size: int | None = None,
    **options: Unpack[CreateOptions],
) -> None:
    """`create_image` for qcow2."""
    name = _name(image)
    chosen: dict[str, Any] = {**options}
    overwrite: bool = chosen.pop("overwrite", False)
    mode: int = chosen.pop("mode", 0o666)
    gate: ImplicitOpenGate | None = chosen.pop("gate", None)
    check_backing: bool = chosen.pop("check_backing", True)
    used: dict[tuple[int, int], str] = {}
    try:
        # First without the size, so that nothing is opened for what cannot be.
        check_size("the size of the disk", 0 if size is None else size)
        check_type("the mode", mode, int)
        parameters = Parameters(size=_round_up(size or 0), **chosen)
        parameters.check()
        _check_name(parameters.data_file)
        if parameters.backing_file is not None and (check_backing or size is None):
            backing_size = await _look_at_backing(image, parameters, gate, used)
            size = backing_size if size is None else size
        if size is None:
            raise OutOfRangeError("the size of the disk is needed")
        layout = plan_layout(replace(parameters, size=_round_up(size)))
    except ImagofsError as error:
        error.filename = error.filename or name
        raise
    data_path = _data_path(image, parameters)
    for path in (name, data_path):
        _check_unused(path, used)
    if data_path is not None and name is not None and _is_same_file(name, data_path):
        raise UnsupportedError("the data file cannot be the image itself", filename=name)
    async with AsyncExitStack() as stack:
        storage = await stack.enter_async_context(_made(image, overwrite, mode))
        data_storage = None
        if data_path is not None:
            data_storage = await stack.enter_async_context(_made(data_path, overwrite, mode))
        await _write(storage, data_storage, layout, parameters.preallocate)


async def _write(
    storage: Storage, data_storage: Storage | None, layout: Layout, preallocate: PreallocateMode
) -> None:
    """Write the image under the locks that other programs respect."""
    storages = [s for s in (storage, data_storage) if isinstance(s, FileStorage)]
    for file in storages:
        try:
            file.lock(writable=True)
        except UnsupportedError:
            pass  # then there is nobody who could hold it
    try:
        await write_image(storage, data_storage, layout, preallocate)
    finally:
        for file in storages:
            file.unlock()


async def _create_raw(
    image: str | os.PathLike[str] | Storage,
    size: int | None,
    **options: Unpack[CreateOptions],
) -> None:
    preallocate = options.pop("preallocate", PreallocateMode.NONE)
    overwrite = options.pop("overwrite", False)
    mode = options.pop("mode", 0o666)
    options.pop("gate", None)
    name = _name(image)
    check_type("the mode", mode, int)
    check_type("the preallocation", preallocate, PreallocateMode)
    if options:
        raise UnsupportedError(
            f"a raw image has no {', '.join(options).replace('_', ' ')}", filename=name
        )
    if preallocate is PreallocateMode.FORMAT_ALLOCATE:
        raise UnsupportedError(
            "a raw image has no metadata to preallocate; use falloc or full", filename=name
        )
    if size is None:
        raise OutOfRangeError("the size of the disk is needed", filename=name)
    check_size("the size of the disk", size)
    size = _round_up(size)
    async with _made(image, overwrite, mode) as storage:
        if isinstance(storage, FileStorage) and storage.is_block_device:
            if size > storage.size():
                raise OutOfRangeError(
                    f"the device has {storage.size()} bytes, {size} are needed", filename=name
                )
            if preallocate is not PreallocateMode.NONE:
                await storage.write_allocated_zeroes(0, size)
        elif preallocate is PreallocateMode.NONE:
            await storage.resize(size, PreallocateMode.ZERO)
        else:
            await storage.resize(size, preallocate)
        await storage.sync()


def _name(image: str | os.PathLike[str] | Storage) -> str | None:
    return image.filename if isinstance(image, Storage) else os.path.abspath(path_of(image))


def _round_up(size: int) -> int:
    """A size as a disk has it: whole sectors."""
    return -(-size // _SECTOR) * _SECTOR


# --- what the image refers to -----------------------------------------------------------------


async def _look_at_backing(
    image: str | os.PathLike[str] | Storage,
    parameters: Parameters,
    gate: ImplicitOpenGate | None,
    used: dict[tuple[int, int], str],
) -> int:
    """Open the backing file with its whole chain, for its size; note in `used` which files it has.

    Raises:
        GateDeniedError: The gate refuses it.
        ChainError: It cannot be opened.
        FormatError, UnsupportedError: It is no image of its format.
    """
    # Relative names count from a file that does not exist yet.
    place = NullStorage()
    place.filename = _name(image)
    assert parameters.backing_file is not None
    context = OpenContext.of(gate=gate).within(place)
    backing = await context.open_backing(parameters.backing_file, parameters.backing_format)
    async with backing:
        for storage in backing.storages():
            if isinstance(storage, FileStorage):
                status = os.fstat(storage.fileno())
                used[status.st_dev, status.st_ino] = storage.filename or ""
        return backing.size()


def _check_name(name: str | None) -> None:
    """See that opening the image will take the name for a file."""
    if name is not None and re.match(r"[A-Za-z0-9+.-]+:", name):
        raise UnsupportedError(
            f"the data file {name!r} would be taken for a protocol; begin its name with ./"
        )


def _data_path(image: str | os.PathLike[str] | Storage, parameters: Parameters) -> str | None:
    """Where the external data file is."""
    if parameters.data_file is None:
        return None
    if isinstance(image, Storage):
        return image.resolve_relative_path(parameters.data_file)
    folder = os.path.dirname(os.path.abspath(os.fspath(image)))
    return os.path.join(folder, parameters.data_file)


def _check_unused(path: str | None, used: dict[tuple[int, int], str]) -> None:
    """See that a file to be made is none of the chain below.

    Raises:
        ChainError: It is.
    """
    if path is None:
        return
    try:
        status = os.stat(path)
    except OSError:
        return
    if (status.st_dev, status.st_ino) in used:
        raise ChainError("a file of the new image's own backing chain", filename=path)


def _is_same_file(first: str, second: str) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return os.path.realpath(first) == os.path.realpath(second)


# --- files that are made ------------------------------------------------------------------------


@asynccontextmanager
async def _made(
    image: str | os.PathLike[str] | Storage, overwrite: bool, mode: int
) -> AsyncIterator[Storage]:
    """An empty storage to write an image to; a new file is removed again if the block fails.

    Raises:
        StorageError: It exists, and `overwrite` is false.
    """
    if isinstance(image, Storage):
        if image.size() and not overwrite:
            raise StorageError("the storage is not empty", filename=image.filename)
        if image.size() and not (isinstance(image, FileStorage) and image.is_block_device):
            await image.resize(0)
            await image.sync()
        yield image
        return
    path = os.path.abspath(os.fspath(image))
    storage, is_new = await _make_file(path, overwrite, mode)
    try:
        async with storage:
            yield storage
    except BaseException:
        if is_new:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_remove, path)
        raise


async def _make_file(path: str, overwrite: bool, mode: int) -> tuple[FileStorage, bool]:
    """A new file, or an existing one without contents; and whether it is new."""
    options = StorageCreateOptions(preallocate=PreallocateMode.NONE, mode=mode)
    try:
        return await FileStorage.create(path, options), True
    except StorageError as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        if not overwrite:
            raise StorageError(
                "it exists already, and overwriting was not asked for",
                error=error.errno or 0,
                filename=path,
            ) from error
    storage = await FileStorage.create(path, replace(options, overwrite=True))
    try:
        # Nothing of the old image may come back behind the new header.
        await storage.sync()
    except BaseException:
        with trio.CancelScope(shield=True):
            await storage.close()
        raise
    return storage, False


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # gone, or no longer ours to remove
