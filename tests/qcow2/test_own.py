"""Host clusters with metadata: the set of them, and images that have very many."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagofs.access import FormatAccess
from imagofs.errors import FormatError, UnsupportedError
from imagofs.format.qcow2 import own as own_module
from imagofs.format.qcow2.loading import load
from imagofs.format.qcow2.own import OwnClusters
from imagofs.opening import OpenContext
from imagofs.storage.memory import MemoryStorage

COPIED = 1 << 63

operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "discard", "add_range", "remove_range"]),
        st.integers(1, 200),
        st.integers(1, 30),
    ),
    max_size=60,
)


@given(operations, st.integers(0, 40), st.sampled_from([64, 1 << 29]))
def test_the_set_is_a_set(steps: list[tuple[str, int, int]], few: int, bits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_module, "MOST_IN_A_SET", few)
        patch.setattr(own_module, "MOST_BITS", bits)
        own, singles, ranges = OwnClusters(), set[int](), list[range]()
        for step, start, length in steps:
            clusters = range(start, start + length)
            model = singles.union({0}, *ranges)
            if step == "add" and start not in model:
                own.add(start)
                singles.add(start)
            elif step == "discard" and start in singles:
                own.discard(start)
                singles.discard(start)
            elif step == "add_range" and model.isdisjoint(clusters):
                own.add_range(clusters)
                ranges.append(clusters)
            elif step == "remove_range" and ranges:
                own.remove_range(ranges.pop(start % len(ranges)))
            model = singles.union({0}, *ranges)
            assert {cluster for cluster in range(250) if cluster in own} == model
            assert own.overlaps(clusters) == (not model.isdisjoint(clusters))
            assert own.reach(max(model))


def put(storage: MemoryStorage, offset: int, *words: int) -> None:
    """Write big-endian 64-bit words."""
    storage.writev_nowait([memoryview(struct.pack(f">{len(words)}Q", *words))], offset)


def image(length: int, l1_entries: int, snapshots: int = 0) -> MemoryStorage:
    """An image with clusters of 512 bytes: header, refcount table, block, L1 table at 1 MiB,
    snapshot table at 256 KiB."""
    size = min(l1_entries, 1) * 32768
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, 0, 0, 9, size, 0, l1_entries, 1 << 20),
        *(512, 1, snapshots, (256 << 10) if snapshots else 0, 0, 0, 0, 4, 104),
    )
    storage = MemoryStorage(length)
    storage.writev_nowait([memoryview(header)], 0)
    put(storage, 512, 1024)
    storage.writev_nowait([memoryview(b"\0\1" * 3)], 1024)
    return storage


async def open_writable(storage: MemoryStorage) -> FormatAccess:
    context = OpenContext.of()
    return FormatAccess(await load(storage, context=context, writable=True), cache=context.cache)


@pytest.mark.timeout(20)
async def test_many_snapshots_with_long_l1_tables() -> None:
    """5,000 tables of 32 MiB: cluster by cluster that would be 320 million numbers."""
    count, length = 5000, 32 << 20
    storage = image((count + 1) * length, 1, count)
    entry = struct.Struct(">QIHHIIQIIQQ")

    def table(first: int) -> memoryview:
        return memoryview(
            b"".join(
                entry.pack(first + n * length, length // 8, 0, 0, 0, 0, 0, 0, 16, 0, 32768)
                for n in range(count)
            )
        )

    storage.writev_nowait([table(512 << 10)], 256 << 10)
    with pytest.raises(FormatError, match=r"snapshot .* misplaced or lies over"):  # the L1 table
        await open_writable(storage)
    storage.writev_nowait([table(2 << 20)], 256 << 10)
    access = await open_writable(storage)
    await access.close()


async def test_many_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = own_module.MOST_IN_A_SET + 5000
    storage = image((8 << 20) + entries * 512, entries)
    l1 = [COPIED | (8 << 20) + number * 512 for number in range(entries)]
    put(storage, 1 << 20, *l1)
    access = await open_writable(storage)
    own = access.driver.metadata.own  # type: ignore[attr-defined]
    first = (8 << 20) >> 9
    assert all(cluster in own for cluster in range(first, first + entries))
    assert first - 1 not in own
    assert first + entries not in own
    await access.close()

    contents = storage.to_bytes()
    twice = MemoryStorage(contents)
    put(twice, (1 << 20) + 8 * (entries - 1), l1[7])  # two entries for one table
    with pytest.raises(FormatError, match=r"L2 table .* lies over"):
        await open_writable(twice)

    monkeypatch.setattr("imagofs.format.qcow2.loading.MOST_BITS", 1 << 10)
    with pytest.raises(UnsupportedError, match="too many to write to"):
        await open_writable(MemoryStorage(contents))
