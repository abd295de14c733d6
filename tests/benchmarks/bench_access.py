"""FormatAccess without FUSE: reads and writes from the page cache."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import trio

MIB = 1 << 20


@pytest.mark.parametrize("length", [4096, MIB])
@pytest.mark.parametrize("kind", ["flat", "chain"])
def bench_read_in_line(
    benchmark, kind: str, length: int, request: pytest.FixtureRequest, opened
) -> None:
    image = opened(request.getfixturevalue(kind))
    trio.run(image.read, bytearray(image.size()), 0)
    view = memoryview(bytearray(length))
    offset = random.Random(1).randrange(image.size() // length) * length
    assert benchmark(image.read_nowait, view, offset)


@pytest.mark.parametrize("length", [4096, MIB])
def bench_read_awaited(benchmark, length: int, flat: Path, opened) -> None:
    """64 reads in one trio run."""
    image = opened(flat)
    view = memoryview(bytearray(length))

    async def reads() -> None:
        for number in range(64):
            await image.readv((view,), number * length % image.size())

    benchmark(trio.run, reads)


@pytest.mark.parametrize("length", [4096, MIB])
def bench_write_in_place(benchmark, length: int, flat: Path, tmp_path: Path, opened) -> None:
    image = opened(Path(shutil.copy(flat, tmp_path)), writable=True)
    view = memoryview(bytearray(length))

    async def writes() -> None:
        for number in range(16):
            await image.writev((view,), number * length)

    benchmark(trio.run, writes)


def bench_write_allocating_1m(benchmark, tmp_path: Path, opened) -> None:
    """1 MiB into new clusters, and given back by a discard."""
    from tests import qemu

    image = opened(qemu.create(tmp_path / "new.qcow2", 64 * MIB), writable=True)
    view = memoryview(bytearray(MIB))

    async def write() -> None:
        await image.writev((view,), 0)
        await image.discard_to_zero(0, MIB)
        await image.flush()

    benchmark(trio.run, write)
