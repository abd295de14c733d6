"""The storage drivers that the conformance suite runs over."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from imagofs.storage import (
    AnnotatedStorage,
    FileStorage,
    MemoryStorage,
    NullStorage,
    Storage,
    StorageOpenOptions,
)
from tests.support.storages import RecordingStorage, SlowStorage, StrictStorage

#: Size of the block devices under test, which cannot change.
DEVICE_SIZE = 256 << 10


@dataclass
class Driver:
    """A kind of storage.

    Attributes:
        name: How the tests call it.
        open: Makes a storage, writable or not, that holds the given bytes.
        grows: Whether it can be longer than at first.
        keeps: Whether what is written can be read again.
        fixed_size: The only size that it has.
    """

    name: str
    open: Callable[..., Awaitable[Storage]]
    grows: bool = True
    keeps: bool = True
    fixed_size: int | None = None


@contextmanager
def loop_device(backing: Path, *options: str) -> Iterator[str]:
    """A loop device on the file `backing`."""
    done = subprocess.run(
        ["losetup", "-f", "--show", *options, str(backing)],
        check=True,
        capture_output=True,
        text=True,
    )
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


NAMES = [
    "file",
    "tmpfs",
    "direct",
    "direct-tmpfs",
    "block",
    "block-direct",
    "from-fd",
    "memory",
    "annotated",
    "annotated-direct",
    "recording",
    "strict",
    "strict-odd",
    "slow-strict",
    "null",
]


def tmpfs_has_direct() -> bool:
    """Whether files on a tmpfs can be opened with O_DIRECT (since Linux 6.6)."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        try:
            os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            return False
    return True


@contextmanager
def driver(name: str, tmp_path: Path) -> Iterator[Driver]:
    """The driver called `name`, with its files below `tmp_path`, and what it needs besides."""
    if name.startswith("block"):
        with loop_device_driver(name, tmp_path) as result:
            yield result
    elif name.endswith("tmpfs"):
        folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        try:
            yield Driver(name, _file_opener(folder / "file", direct="direct" in name))
        finally:
            shutil.rmtree(folder)
    else:
        yield _plain_driver(name, tmp_path / "file")


def _plain_driver(name: str, path: Path) -> Driver:
    async def memory(contents: bytes, *, writable: bool = True) -> Storage:
        return MemoryStorage(contents, writable=writable)

    async def null(contents: bytes, *, writable: bool = True) -> Storage:
        return NullStorage(len(contents))

    async def annotated(contents: bytes, *, writable: bool = True) -> Storage:
        return AnnotatedStorage(await memory(contents, writable=writable), "tag")

    async def annotated_direct(contents: bytes, *, writable: bool = True) -> Storage:
        inner = await _file_opener(path, direct=True)(contents, writable=writable)
        return AnnotatedStorage(inner, "tag")

    async def recording(contents: bytes, *, writable: bool = True) -> Storage:
        return RecordingStorage(await memory(contents, writable=writable))

    async def strict(contents: bytes, *, writable: bool = True) -> Storage:
        return StrictStorage(await memory(contents, writable=writable))

    async def strict_odd(contents: bytes, *, writable: bool = True) -> Storage:
        inner = await memory(contents, writable=writable)
        return StrictStorage(inner, request=512, memory=16384, zero=65536, discard=8192)

    async def slow_strict(contents: bytes, *, writable: bool = True) -> Storage:
        inner = await memory(contents, writable=writable)
        return SlowStorage(StrictStorage(inner, request=512, memory=64, zero=2048))

    async def from_fd(contents: bytes, *, writable: bool = True) -> Storage:
        path.write_bytes(contents)
        fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        return FileStorage.from_fd(fd)

    openers: dict[str, Callable[..., Awaitable[Storage]]] = {
        "file": _file_opener(path),
        "direct": _file_opener(path, direct=True),
        "from-fd": from_fd,
        "memory": memory,
        "annotated": annotated,
        "annotated-direct": annotated_direct,
        "recording": recording,
        "strict": strict,
        "strict-odd": strict_odd,
        "slow-strict": slow_strict,
        "null": null,
    }
    return Driver(name, openers[name], keeps=name != "null")


def _file_opener(path: Path, *, direct: bool = False) -> Callable[..., Awaitable[Storage]]:
    async def open_file(contents: bytes, *, writable: bool = True) -> Storage:
        path.write_bytes(contents)
        return await FileStorage.open(path, StorageOpenOptions(writable=writable, direct=direct))

    return open_file


@contextmanager
def loop_device_driver(name: str, tmp_path: Path) -> Iterator[Driver]:
    """A loop device with the file `backing` in `tmp_path` behind it."""
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(DEVICE_SIZE))
    with loop_device(backing) as device:

        async def open_device(contents: bytes, *, writable: bool = True) -> Storage:
            assert len(contents) == DEVICE_SIZE
            with open(device, "wb") as file:
                file.write(contents)
            options = StorageOpenOptions(writable=writable, direct="direct" in name)
            return await FileStorage.open(device, options)

        yield Driver(name, open_device, grows=False, fixed_size=DEVICE_SIZE)
