"""An image that is closed while others use it: what was said to be done is in the file."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import trio

from imagofs import (
    ClosedError,
    FormatAccess,
    MemoryStorage,
    Qcow2,
    Raw,
    StorageError,
    SyncFormatAccess,
    check_image,
    open_image,
)
from tests import qemu
from tests.support.storages import SlowStorage

MIB = 1 << 20
DATA = bytes(range(1, 251)) * 300
START = 1000


async def contents(format: str) -> bytes:
    memory = MemoryStorage()
    if format == "raw":
        await Raw.create(memory, MIB)
    else:
        await Qcow2.create(memory, MIB)
        async with FormatAccess(await Qcow2.open(memory, writable=True)) as image:
            await image.write(b"\xff" * 65536, 0)
    return memory.to_bytes()


async def opened(format: str, memory: MemoryStorage) -> FormatAccess:
    storage = SlowStorage(memory)
    if format == "raw":
        return FormatAccess(await Raw.open(storage, writable=True))
    return FormatAccess(await Qcow2.open(storage, writable=True))


async def read(format: str, data: bytes, length: int = len(DATA)) -> bytes:
    memory = MemoryStorage(data)
    if format == "qcow2":
        report = await check_image(MemoryStorage(data))
        assert (report.corruptions, report.leaks) == (0, 0)
    found = bytearray(length)
    async with await opened(format, memory) as image:
        await image.read(found, START)
    return bytes(found)


CHANGES: dict[str, tuple[Callable[[FormatAccess], Awaitable[object]], bytes]] = {
    "write": (lambda image: image.write(DATA, START), DATA),
    "zeroes": (lambda image: image.write_zeroes(START, len(DATA)), bytes(len(DATA))),
    "discard": (lambda image: image.discard_to_zero(START, len(DATA)), bytes(len(DATA))),
}


@pytest.mark.parametrize("format", ["qcow2", "raw"])
@pytest.mark.parametrize("change", CHANGES)
async def test_close_waits_for_changes(format: str, change: str) -> None:
    """However far it had come when the close began."""
    before = await contents(format)
    old = await read(format, before)
    make, new = CHANGES[change]
    outcomes = set()
    for turns in range(40):
        memory = MemoryStorage(before)
        image = await opened(format, memory)
        done = False

        async def run(image: FormatAccess = image) -> None:
            nonlocal done
            try:
                await make(image)
                done = True
            except ClosedError:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            await image.close()
        assert await read(format, memory.to_bytes()) == (new if done else old), turns
        outcomes.add(done)
    assert outcomes == {True, False}


@pytest.mark.parametrize("format", ["qcow2", "raw"])
async def test_a_cancelled_close_makes_no_promise(format: str) -> None:
    """What it did not wait for is not said to be done."""
    memory = MemoryStorage(await contents(format))
    image = await opened(format, memory)
    outcome: list[object] = []

    async def write() -> None:
        try:
            await image.write(DATA, START)
        except ClosedError as error:
            outcome.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        for _ in range(2):
            await trio.lowlevel.checkpoint()
        with trio.CancelScope() as scope:
            scope.cancel()
            await image.close()
        assert scope.cancelled_caught
        assert image.closed
        assert memory.closed
    assert len(outcome) == 1


async def test_a_second_close_waits_for_the_first() -> None:
    memory = MemoryStorage(await contents("qcow2"))
    image = await opened("qcow2", memory)
    await image.write(DATA, START)

    async def close() -> None:
        await image.close()
        assert memory.closed
        assert await read("qcow2", memory.to_bytes()) == DATA

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(close)
    await image.close()


async def test_everything_is_closed_though_one_cannot_be(tmp_path: Path) -> None:
    class Unclosable(MemoryStorage):
        async def close(self) -> None:
            await super().close()
            raise StorageError("cannot be closed")

    path = tmp_path / "image.qcow2"
    await Qcow2.create(path, MIB, data_file="data")
    storages = Unclosable(path.read_bytes()), MemoryStorage(MIB), MemoryStorage(MIB)
    below = FormatAccess(await Raw.open(storages[2]))
    image = FormatAccess(await Qcow2.open(storages[0], data_file=storages[1], backing=below))
    with pytest.raises(StorageError, match="cannot be closed"):
        await image.close()
    assert [storage.closed for storage in storages] == [True, True, True]
    await image.close()


@pytest.fixture
def traced() -> Iterator[Callable[[], int]]:
    """Bytes that Python's objects took since, while no garbage is collected."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        gc.enable()


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("qcow2", ["-c", "-o", "cluster_size=512"]),  # many tables
        ("qcow2", ["-c"]),
        ("qcow2", ["-c", "-o", "compression_type=zstd"]),
        ("vmdk", ["-o", "subformat=streamOptimized"]),
    ],
)
@pytest.mark.parametrize("order", ["sequential", "mixed"])
async def test_a_closed_image_keeps_no_caches(
    fmt: str, options: list[str], order: str, tmp_path: Path, traced: Callable[[], int]
) -> None:
    """The garbage collector may be long in coming to it."""
    (tmp_path / "flat").write_bytes(DATA[:4000] * (4 * MIB // 4000))
    image = tmp_path / "image"
    qemu.qemu_img("convert", "-f", "raw", "-O", fmt, *options, tmp_path / "flat", image)

    async def left_behind() -> int:
        before = traced()
        async with await open_image(image) as access:
            positions = list(range(0, access.size(), 4096))
            if order == "mixed":
                Random(1).shuffle(positions)
            for position in positions:
                await access.read(bytearray(min(4096, access.size() - position)), position)
            # What is inflated ahead may be in memory of the library's, which is not traced.
            assert order == "sequential" or traced() - before > MIB
        return traced() - before

    await left_behind()  # among it what is kept for all images
    assert await left_behind() < MIB


def test_threads_that_write_while_one_closes() -> None:
    memory = MemoryStorage(trio.run(contents, "qcow2"))
    image = SyncFormatAccess(trio.run(opened, "qcow2", memory))
    written: list[int] = []
    enough = threading.Event()

    def write(number: int) -> None:
        position = number
        while True:
            try:
                image.write(bytes([number + 1]) * 4096, START + position * 4096)
            except ClosedError:
                return
            written.append(position)
            if len(set(written)) == 12:
                enough.set()
            position = (position + 4) % 16

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(trio.to_thread.run_sync, write, number)
            await trio.to_thread.run_sync(enough.wait)
            await trio.to_thread.run_sync(image.close)
        found = await read("qcow2", memory.to_bytes(), 16 * 4096)
        for position in set(written):
            assert found[position * 4096 :][:4096] == bytes([position % 4 + 1]) * 4096

    trio.run(main)
