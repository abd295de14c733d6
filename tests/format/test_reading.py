"""What every format promises to readers, over all formats."""

import json
import random

import pytest
import trio

from imagofs import (
    EofMapping,
    ImagofsError,
    IndirectMapping,
    OutOfRangeError,
    RawMapping,
    SpecialMapping,
    ZeroMapping,
)
from imagofs.format.base import (
    HOST_OFFSET_MASK,
    IN_PLACE,
    INDIRECT,
    MIXED,
    NOT_CACHED,
    SPECIAL,
    STORAGE_MASK,
    ZERO,
)
from tests.format.formats import NAMES, READ_ONLY, SIZE, WRITABLE, disk, read
from tests.support.storages import SlowStorage, StrictStorage

MASTER = 4711


@pytest.fixture(params=NAMES)
def kind(request):
    return disk(request.param)


#: Each format as it can be opened: read-only, and for writing.
either_way = pytest.mark.parametrize(
    ("name", "writable"), [(name, False) for name in NAMES] + [(name, True) for name in WRITABLE]
)


def offsets(count, seed=MASTER):
    """Offsets that matter, and some that are chosen at random."""
    edges = [0, 1, 511, 512, 4095, 65535, 65536, 65537, SIZE - 513, SIZE - 512, SIZE - 1]
    return edges + [random.Random(seed).randrange(SIZE) for _ in range(count)]


async def bytes_of(mapping, guest_offset):
    """What a mapping of `guest_offset` says is there."""
    got = memoryview(bytearray(mapping.length))
    match mapping:
        case RawMapping():
            await mapping.storage.readv([got], mapping.offset)
        case SpecialMapping():
            assert mapping.offset == guest_offset
            await mapping.driver.readv_special([got], mapping.offset)
        case IndirectMapping():
            inside = max(0, min(mapping.length, mapping.layer.size() - mapping.offset))
            if inside:  # else the layer below is shorter
                await mapping.layer.read(got[:inside], mapping.offset)
        case ZeroMapping():
            pass
        case _:
            raise AssertionError(mapping)
    return bytes(got)


@either_way
async def test_facts(name, writable):
    kind = disk(name)
    opened = await kind.open(writable=writable)
    async with opened.access as access:
        driver = access.driver
        assert driver.size() == access.size() == SIZE
        assert driver.writable == access.writable == access.is_writable == writable
        assert driver.format_name == access.format_name == kind.name.split("-")[0]
        assert driver.storages[0] is opened.wrapped["image"]
        assert set(driver.data_storages) <= set(driver.storages)
        assert set(access.dependencies().storages) == set(opened.wrapped.values())
        assert access.dependencies().layers[0] is driver
        assert json.loads(json.dumps(driver.details())) == driver.details()
        assert driver.allocated_bytes() >= 0
        granule = driver.granularity
        assert granule == 0 or (granule >= 512 and granule & granule - 1 == 0)
        if driver.zero_granularity is not None:
            assert driver.zero_granularity > 0
    assert all(memory.closed for memory in opened.memories.values())
    assert access.closed
    await access.close()


@pytest.mark.parametrize("name", READ_ONLY)
async def test_what_cannot_be_written_is_not_opened_for_writing(name):
    with pytest.raises(ImagofsError, match="read-only"):
        await disk(name).open(writable=True)


@either_way
async def test_mappings_cover_the_disk(name, writable):
    kind = disk(name)
    opened = await kind.open(writable=writable)
    async with opened.access as access:
        for get in (access.driver.get_mapping, access.get_shallow_mapping, access.get_mapping):
            position = 0
            while not isinstance(mapping := await get(position, SIZE), EofMapping):
                assert 0 < mapping.length <= SIZE - position
                length = mapping.length
                assert await bytes_of(mapping, position) == kind.contents[position:][:length]
                if isinstance(mapping, RawMapping):
                    assert not mapping.writable or writable
                position += length
            assert position == SIZE
            assert mapping.length == 0
            for offset in (SIZE, SIZE + 1, 1 << 62):
                assert await get(offset, 1) == EofMapping()


async def test_any_part_of_a_mapping(kind):
    opened = await kind.open()
    async with opened.access as access:
        for guest_offset in offsets(60):
            for max_length in (1, 512, 70_000, 1 << 62):
                for get in (access.get_shallow_mapping, access.get_mapping):
                    mapping = await get(guest_offset, max_length)
                    assert 0 < mapping.length <= min(max_length, SIZE - guest_offset)
                    want = kind.contents[guest_offset : guest_offset + mapping.length]
                    assert await bytes_of(mapping, guest_offset) == want
                    assert not isinstance(mapping, IndirectMapping) or (
                        get == access.get_shallow_mapping
                    )


@either_way
async def test_entries_agree_with_mappings(name, writable):
    kind = disk(name)
    opened = await kind.open(writable=writable)
    async with opened.access as access:
        driver = access.driver
        if writable:  # in place means: from the first write on
            await access.write(kind.contents[:512], 0)
        granule = driver.granularity
        if not granule:
            assert driver.entry_at(0) == MIXED
            return
        starts = {offset // 512 * 512 for offset in offsets(60)} | set(range(0, SIZE, granule))
        for guest_offset in sorted(starts):
            end = min(SIZE, (guest_offset | granule - 1) + 1)
            first = await driver.get_mapping(guest_offset, 1)
            entry = driver.entry_at(guest_offset)
            assert entry != NOT_CACHED
            if entry == MIXED:
                continue
            last = await driver.get_mapping(end - 1, 1)
            if entry >= 0:
                storage = driver.data_storages[entry & STORAGE_MASK]
                for mapping, distance in ((first, 0), (last, end - 1 - guest_offset)):
                    assert isinstance(mapping, RawMapping)
                    assert mapping.storage is storage
                    assert mapping.offset == (entry & HOST_OFFSET_MASK) + distance
                    assert mapping.writable == bool(entry & IN_PLACE)
                    assert writable or not mapping.writable
                continue
            for mapping in (first, last):
                if entry == INDIRECT:
                    assert isinstance(mapping, IndirectMapping) or (
                        driver.backing is None and mapping == ZeroMapping(1, explicit=False)
                    )
                elif entry == ZERO:
                    assert isinstance(mapping, ZeroMapping)
                else:
                    assert entry == SPECIAL
                    assert isinstance(mapping, SpecialMapping)


@either_way
@pytest.mark.parametrize("wrap", [lambda storage: storage, SlowStorage], ids=["", "slow"])
async def test_many_entries_are_those_that_are_asked_one_by_one(name, writable, wrap):
    opened = await disk(name).open(writable=writable, wrap=wrap)
    numbers = random.Random(MASTER)
    async with opened.access as access:
        driver = access.driver
        for turn in range(100):
            granule = min(driver.granularity or 512, 512 << numbers.randrange(9))
            first = numbers.randrange(-(-SIZE // granule))
            count = numbers.randint(1, -(-SIZE // granule) - first)
            offsets = range(first * granule, (first + count) * granule, granule)
            # Tables of a slow storage are brought in by and by; before that they are not cached.
            if turn % 10 == 9:
                await driver.get_mapping(offsets[0], 1)
            want = [(offset, driver.entry_at(offset)) for offset in offsets]
            found = driver.entries_at(offsets[0], granule, count)
            assert found == [pair for pair in want if pair[1] != INDIRECT]


async def test_map_merges_neighbours(kind):
    opened = await kind.open()
    async with opened.access as access:
        position = 0
        before = None
        async for guest_offset, mapping in access.map():
            assert guest_offset == position
            assert mapping.length > 0
            kind_of = (type(mapping), getattr(mapping, "explicit", None))
            if before is not None and kind_of == before and isinstance(mapping, ZeroMapping):
                raise AssertionError("two zero mappings in a row")
            before = kind_of if not getattr(mapping, "allocated", False) else None
            position += mapping.length
        assert position == SIZE
        parts = [(offset, part.length) async for offset, part in access.map(1000, 300_000)]
        assert parts[0][0] == 1000
        assert sum(length for _, length in parts) == 300_000
        assert [step async for step in access.map(SIZE, 0)] == []
        with pytest.raises(OutOfRangeError):
            async for _ in access.map(1, SIZE):
                pass


async def test_reads_equal_the_model(kind):
    opened = await kind.open()
    numbers = random.Random(MASTER)
    async with opened.access as access:
        assert await read(access, 0, SIZE) == kind.contents
        for guest_offset in offsets(40):
            for length in (1, 512, 5000, 70_000, 200_000):
                length = min(length, SIZE - guest_offset)
                want = kind.contents[guest_offset : guest_offset + length]
                assert await read(access, guest_offset, length) == want
                view = memoryview(bytearray(length))
                if access.read_nowait(view, guest_offset):
                    assert view == want
                # Cut at any places, with an empty buffer between.
                cut = numbers.randrange(length + 1)
                parts = [bytearray(cut), bytearray(), bytearray(length - cut)]
                await access.readv(parts, guest_offset)
                assert b"".join(parts) == want
        await access.read(bytearray(), SIZE)
        await access.readv([], 0)


async def test_reads_without_waiting_once_all_is_cached(kind):
    """Memory never needs waiting, so that after one read all is answered in line."""
    opened = await kind.open()
    async with opened.access as access:
        assert await read(access, 0, SIZE) == kind.contents
        for guest_offset in range(0, SIZE, 512 * 7):
            view = memoryview(bytearray(min(4096, SIZE - guest_offset)))
            # Extents may share a granule, which is looked at in the slow way then.
            if access.driver.granularity and not kind.name.startswith("vmdk"):
                assert access.read_nowait(view, guest_offset)
                assert view == kind.contents[guest_offset : guest_offset + len(view)]


async def test_readers_at_the_same_time(kind):
    opened = await kind.open(wrap=SlowStorage)
    async with opened.access as access:

        async def reader(seed):
            for guest_offset in offsets(6, seed):
                length = min(100_000, SIZE - guest_offset)
                want = kind.contents[guest_offset : guest_offset + length]
                assert await read(access, guest_offset, length) == want

        async with trio.open_nursery() as nursery:
            for seed in range(8):
                nursery.start_soon(reader, seed)


async def test_storages_with_alignments(kind):
    def wrap(storage):
        return StrictStorage(storage, request=512, memory=512, zero=4096, discard=4096)

    opened = await kind.open(wrap=wrap)
    async with opened.access as access:
        assert (access.memory_alignment, access.request_alignment) == (512, 512)
        assert await read(access, 0, SIZE) == kind.contents
        for guest_offset in offsets(20):
            length = min(3333, SIZE - guest_offset)
            want = kind.contents[guest_offset : guest_offset + length]
            assert await read(access, guest_offset, length) == want


async def test_forgetting_what_is_cached(kind):
    opened = await kind.open()
    async with opened.access as access:
        assert await read(access, 0, SIZE) == kind.contents
        await access.invalidate_cache()
        assert await read(access, 0, SIZE) == kind.contents


@pytest.mark.parametrize("seed", range(3))
async def test_cancelled_reads(kind, seed):
    """Cancelled at any await, a read leaves nothing behind, and the next one is right."""
    for nth in range(1, 40):
        scope = trio.CancelScope()

        def cancel(number, nth=nth, scope=scope):
            if number >= nth:
                scope.cancel()

        slow: list[SlowStorage] = []

        def wrap(storage, cancel=cancel, slow=slow):
            slow.append(SlowStorage(storage))
            return slow[-1]

        opened = await kind.open(wrap=wrap)
        for storage in slow:
            storage.pauses, storage.on_pause = 0, cancel
        guest_offset = random.Random(seed).randrange(SIZE // 2)
        with scope:
            await read(opened.access, guest_offset, SIZE // 2)
        for storage in slow:
            storage.on_pause = None
        with trio.fail_after(10):
            assert await read(opened.access, 0, SIZE) == kind.contents
            await opened.access.close()
        if not scope.cancelled_caught:
            break
