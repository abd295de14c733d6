"""A metadata cache that is too small for what one request needs: slow at worst, never endless.

Without a fix each of these loads its tables in turns forever, and pytest-timeout ends it.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import trio

from imagofs.access import FormatAccess
from imagofs.caching import MetadataCache
from imagofs.format.qcow2.loading import load
from imagofs.format.raw import Raw
from imagofs.opening import OpenContext
from imagofs.storage.memory import MemoryStorage
from tests import qemu
from tests.support.qcow2_oracle import Layout

CLUSTER = 65536
PER_BLOCK = CLUSTER // 2  # clusters that a refcount block counts
COPIED = 1 << 63

pytestmark = pytest.mark.timeout(20)


async def open_small(
    storage: MemoryStorage, backing: FormatAccess | None = None, *, writable: bool = False
) -> FormatAccess:
    context = OpenContext.of(metadata_bytes=1)
    if backing is not None:
        context = OpenContext(cache=backing._cache)
    driver = await load(storage, context=context, writable=writable, backing=backing)
    return FormatAccess(driver, cache=context.cache)


@pytest.mark.parametrize("room", [True, False], ids=["", "no room"])
async def test_a_chain_with_more_tables_than_the_cache_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    if not room:  # so that only reading layer by layer is left
        monkeypatch.setattr(MetadataCache, "hold_at_least", lambda self, length: None)
    path = qemu.create(tmp_path / "layer", "1M", writes=["write -q -P 3 64k 64k"])
    contents = path.read_bytes()
    image = FormatAccess(Raw(MemoryStorage(b"\7" * (1 << 20))), cache=MetadataCache(1))
    for _ in range(60):
        image = await open_small(MemoryStorage(contents), image)
    found = bytearray(1 << 20)
    await image.read(found, 0)
    assert found == b"\7" * CLUSTER + b"\3" * CLUSTER + b"\7" * (14 * CLUSTER)
    for start in range(0, 1 << 20, 50_000):
        part = bytearray(600)
        await image.read(part, start)
        assert part == found[start : start + 600]
    await image.close()


def put(storage: MemoryStorage, offset: int, *words: int) -> None:
    """Write big-endian 64-bit words."""
    storage.writev_nowait([memoryview(struct.pack(f">{len(words)}Q", *words))], offset)


def spread(tmp_path: Path, blocks: int, *, full: bool) -> tuple[MemoryStorage, Layout]:
    """An image whose file has many refcount blocks, each in the first cluster that it counts.

    Args:
        tmp_path: For files.
        blocks: How many, besides the first one.
        full: All clusters are counted but one per block; else only what is in use.
    """
    path = qemu.create(tmp_path / "image", "32M", writes=["write -q -P 1 0 64k"])
    contents = path.read_bytes()
    layout = Layout(contents)
    storage = MemoryStorage(contents)
    for index in range(1, blocks + 1):
        first = index * PER_BLOCK
        put(storage, layout.table_offset + index * 8, first * CLUSTER)
        counts = bytearray(struct.pack(">H", 1) * (PER_BLOCK if full else 2)).ljust(CLUSTER, b"\0")
        if full:
            counts[2000:2002] = b"\0\0"
        storage.writev_nowait([memoryview(counts)], first * CLUSTER)
    if full:
        [block] = layout.words(layout.table_offset, 1)
        counts = bytearray(struct.pack(">H", 1) * PER_BLOCK)
        storage.writev_nowait([memoryview(counts)], block)
    return storage, layout


async def test_references_that_many_blocks_count(tmp_path: Path) -> None:
    """One discard drops a cluster in each of forty blocks."""
    blocks = 40
    storage, layout = spread(tmp_path, blocks, full=False)
    [l1_entry] = layout.words(layout.l1_offset, 1)
    table = l1_entry & 0x00FFFFFFFFFFFE00
    for index in range(1, blocks + 1):
        host = (index * PER_BLOCK + 1) * CLUSTER
        put(storage, table + index * 8, COPIED | host)
        storage.writev_nowait([memoryview(bytes([index]))], host)
    image = await open_small(storage, writable=True)
    found = bytearray(1)
    await image.read(found, 7 * CLUSTER)
    assert found == b"\7"
    await image.discard_to_zero(0, 41 * CLUSTER)
    await image.sync()
    await image.read(found, 7 * CLUSTER)
    assert found == b"\0"
    for index in range(1, blocks + 1):
        count = bytearray(4)
        storage.readv_nowait([memoryview(count)], index * PER_BLOCK * CLUSTER)
        assert count == b"\0\1\0\0"
    await image.close()


async def test_free_clusters_that_many_blocks_count(tmp_path: Path) -> None:
    """One write takes the only free cluster of each of thirty blocks."""
    storage, _ = spread(tmp_path, 30, full=True)
    image = await open_small(storage, writable=True)
    data = b"".join(bytes([number]) * CLUSTER for number in range(1, 31))
    await image.write(data, CLUSTER)
    found = bytearray(len(data))
    await image.read(found, CLUSTER)
    assert found == data
    await image.sync()
    for index in range(1, 31):
        count = bytearray(2)
        storage.readv_nowait([memoryview(count)], index * PER_BLOCK * CLUSTER + 2000)
        assert count == b"\0\1"
    await image.close()


async def test_a_disk_of_millions_of_tables_leaves_turns_to_others() -> None:
    """None of the tables exists, so there is nothing to wait for."""
    bits, entries = 21, 4 << 20
    cluster = 1 << bits
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, 0, 0, bits, entries << 2 * bits - 3, 0),
        *(entries, 4 * cluster, cluster, 1, 0, 0, 0, 0, 0, 4, 104),
    )
    storage = MemoryStorage(64 * cluster)
    storage.writev_nowait([memoryview(header)], 0)
    put(storage, cluster, 2 * cluster)
    storage.writev_nowait([memoryview(b"\0\1" * 20)], 2 * cluster)
    image = await open_small(storage, writable=True)
    turns = 0
    async with trio.open_nursery() as nursery:

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        nursery.start_soon(count)
        await image.discard_to_zero(5, image.size() - 5)
        await image.write_zeroes(0, image.size())
        nursery.cancel_scope.cancel()
    assert turns > 100
    await image.close()
    assert storage.allocated_bytes() < 1 << 20
