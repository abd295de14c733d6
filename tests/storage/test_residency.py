"""What the page cache has of a file: Residency, and `page_cache_fd`, which relies on it."""

from __future__ import annotations

import mmap
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagofs.storage import FileStorage, MemoryStorage, StorageOpenOptions, residency
from imagofs.storage.residency import Residency
from tests.storage.drivers import loop_device
from tests.storage.files import WRITABLE, views

PAGE = mmap.PAGESIZE
SIZE = 300 * PAGE + 100


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(random.Random(1).randbytes(SIZE))
    return made


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    yield fd
    os.close(fd)


def forget(fd: int, offset: int = 0, length: int = 0) -> None:
    """Drop a range from the page cache, and let nothing be read ahead."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_what_is_covered(path: Path, fd: int) -> None:
    there = Residency(fd)
    assert there.covers(0, SIZE)
    assert there.covers(5 * PAGE - 1, 2)
    forget(fd)
    assert not there.covers(0, SIZE)
    assert not there.covers(10 * PAGE + 5, 1)
    os.pread(fd, 2 * PAGE, 10 * PAGE)
    for offset, length, expected in (
        (10 * PAGE, 2 * PAGE, True),
        (10 * PAGE + 7, PAGE, True),
        (10 * PAGE - 1, 2, False),
        (11 * PAGE + 1, PAGE, False),
        (SIZE - 1, 1, False),
    ):
        assert there.covers(offset, length) is expected
    there.close()
    assert not there.covers(10 * PAGE, 1)
    assert not mappings(path)


def test_each_page_counts(fd: int) -> None:
    there = Residency(fd)
    for missing in (0, 1, 130, 299):
        os.pread(fd, SIZE, 0)
        assert there.covers(0, SIZE)
        forget(fd, missing * PAGE, PAGE)
        if there.covers(missing * PAGE, 1):  # the cache keeps large folios whole
            forget(fd)
            os.pread(fd, missing * PAGE, 0)
            os.pread(fd, SIZE, (missing + 1) * PAGE)
        assert not there.covers(0, SIZE)
    there.close()


def test_a_file_that_grows(path: Path, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_SPARE_BYTES", 0)
    there = Residency(fd)
    assert there.covers(0, SIZE)
    for size in (2 * SIZE, 20 * SIZE):
        os.pwrite(fd, b"new", size - 3)
        assert there.covers(size - 3, 3)
        assert mappings(path) == 1
    there.close()
    assert not mappings(path)


def test_nothing_is_covered_where_nobody_says_so(path: Path) -> None:
    reading, writing = os.pipe()
    there = Residency(reading)  # cannot be mapped
    assert not there.covers(0, 1)
    assert not there.covers(0, 1)
    there.close()
    os.close(reading)
    os.close(writing)
    # Of a file of others that one may not write, mincore(2) says that all is there.
    path.chmod(0o444)
    fd = os.open(path, os.O_RDONLY)
    os.seteuid(65534)
    try:
        there = Residency(fd)
        assert not there.covers(0, 1)
        there.close()
    finally:
        os.seteuid(0)
        os.close(fd)


async def test_the_descriptor(path: Path, fd: int) -> None:
    async with await FileStorage.open(path, WRITABLE) as storage:
        where = storage.page_cache_fd(3 * PAGE + 1, 2 * PAGE)
        assert (
            os.pread(where, 2 * PAGE, 3 * PAGE + 1) == path.read_bytes()[3 * PAGE + 1 :][: 2 * PAGE]
        )
        assert storage.page_cache_fd(0, SIZE) >= 0
        assert storage.page_cache_fd(0, SIZE + 1) == -1, "zeroes behind the end are in no file"
        forget(fd)
        assert storage.page_cache_fd(0, SIZE) == -1
        await storage.writev(views(b"new"), SIZE)
        assert storage.page_cache_fd(SIZE, 3) >= 0
        assert mappings(path) == 1
    assert storage.page_cache_fd(SIZE, 3) == -1
    assert not mappings(path)


async def test_who_has_none(path: Path) -> None:
    async with await FileStorage.open(path, StorageOpenOptions(direct=True)) as storage:
        path.read_bytes()
        assert storage.page_cache_fd(0, PAGE) == -1
    async with MemoryStorage(bytes(PAGE)) as memory:
        assert memory.page_cache_fd(0, PAGE) == -1


async def test_a_file_system_that_does_not_say_what_would_wait() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(bytes(2 * PAGE))
        file.flush()
        async with await FileStorage.open(file.name) as storage:
            buffer = bytearray(PAGE)
            assert storage.readv_nowait(views(buffer), 0) == PAGE
            assert storage.page_cache_fd(0, PAGE) == -1


async def test_a_block_device(path: Path) -> None:
    with loop_device(path) as device:
        async with await FileStorage.open(device) as storage:
            buffer = bytearray(64 * PAGE)
            await storage.readv(views(buffer), 0)
            where = storage.page_cache_fd(0, len(buffer))
            assert where >= 0
            assert os.pread(where, len(buffer), 0) == buffer
