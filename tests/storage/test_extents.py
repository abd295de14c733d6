"""`Storage.extent_at`: every driver says where data may be, and never calls data a hole."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from imagofs import ClosedError, MemoryStorage, NullStorage, OutOfRangeError
from imagofs.storage.base import Storage
from tests.storage.drivers import DEVICE_SIZE, NAMES, Driver, driver, tmpfs_has_direct


async def _extents(storage: Storage) -> list[tuple[int, int, bool]]:
    found = []
    position = 0
    while position < storage.size():
        is_data, end = await storage.extent_at(position)
        assert position < end <= storage.size()
        found.append((position, end, is_data))
        position = end
    return found


@pytest.mark.parametrize("name", NAMES)
async def test_holes_read_as_zero(name: str, tmp_path: Path) -> None:
    if name == "direct-tmpfs" and not tmpfs_has_direct():
        pytest.skip("this kernel's tmpfs does not know O_DIRECT")
    with driver(name, tmp_path) as kind:
        numbers = random.Random(name)
        contents = bytearray(kind.fixed_size or DEVICE_SIZE)
        for _ in range(6):
            start = numbers.randrange(len(contents) - 5000)
            contents[start : start + 5000] = numbers.randbytes(5000)
        storage = await _opened(kind, bytes(contents))
        async with storage:
            for start, end, is_data in await _extents(storage):
                if not is_data and kind.keeps:
                    assert not any(contents[start:end])
            for offset in (-1, storage.size()):
                with pytest.raises(OutOfRangeError):
                    await storage.extent_at(offset)
        with pytest.raises(ClosedError):
            await storage.extent_at(0)


async def _opened(kind: Driver, contents: bytes) -> Storage:
    return await kind.open(contents, writable=True)


async def test_what_was_cut_off_is_no_hole(tmp_path: Path) -> None:
    """Whoever copies only the data must meet the error that a read meets."""
    from imagofs import FileStorage, StorageError

    path = tmp_path / "cut"
    path.write_bytes(b"data" * 4096)
    async with await FileStorage.open(path) as storage:
        os.truncate(path, 4096)
        assert await _extents(storage) == [(0, 4096, True), (4096, 16384, True)]
        os.truncate(path, 0)
        os.truncate(path, 8192)
        assert await _extents(storage) == [(0, 8192, False), (8192, 16384, True)]
        with pytest.raises(StorageError, match="ends early"):
            await storage.read(bytearray(1), 8192)


async def test_holes_are_found(tmp_path: Path) -> None:
    from imagofs import FileStorage

    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 18)
        file.write(b"data" * 4096)
    expected = [
        (0, 1 << 18, False),
        (1 << 18, (1 << 18) + (1 << 14), True),
        ((1 << 18) + (1 << 14), 1 << 20, False),
    ]
    async with await FileStorage.open(path) as storage:
        assert await _extents(storage) == expected
    memory = MemoryStorage(1 << 20)
    await memory.writev([memoryview(b"data" * 4096)], 1 << 18)
    assert await _extents(memory) == expected
    assert await _extents(NullStorage(100)) == [(0, 100, False)]
    assert await _extents(MemoryStorage(100)) == [(0, 100, False)]
    assert await _extents(MemoryStorage(b"x" * 100)) == [(0, 100, True)]
