"""What every format promises to readers, over all formats."""

import json
import random

import pytest
import trio

from imagofs import (
    ClosedError,
    EofMapping,
    FileStorage,
    FormatAccess,
    ImagofsError,
    IndirectMapping,
    IoVector,
    OutOfRangeError,
    PreallocateMode,
    Qcow2,
    Raw,
    RawMapping,
    ReadOnlyError,
    SpecialMapping,
    StorageError,
    WrongTypeError,
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
from tests.format.formats import NAMES, QCOW2, READ_ONLY, SIZE, WRITABLE, disk
from tests.support.storages import FaultyStorage, SlowStorage, StrictStorage

MASTER = 4711


@pytest.fixture(params=NAMES)
def kind(request):
    return disk(request.param)


#: Each format as it can be opened: read-only, and for writing.
either_way = pytest.mark.parametrize(
    ("name", "writable"), [(name, False) for name in NAMES] + [(name, True) for name in WRITABLE]
)


async def read(access, guest_offset, length):
    got = bytearray(length)
    await access.read(got, guest_offset)
    return bytes(got)


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


# --- bad input ------------------------------------------------------------------------------------

OUTSIDE = [
    (-1, 1),
    (-512, 512),
    (SIZE, 1),
    (SIZE - 1, 2),
    (0, SIZE + 1),
    (1 << 70, 1),
    (1, 1 << 40),
]


async def test_requests_outside_of_the_disk(kind):
    opened = await kind.open(writable=kind.writable)
    before = opened.files()
    async with opened.access as access:
        calls = [
            access.write_zeroes,
            access.discard_to_any,
            access.discard_to_zero,
            access.discard_to_backing,
            access.ensure_data_mapping,
            access.ensure_zero_mapping,
        ]
        for guest_offset, length in OUTSIDE:
            if length <= 1 << 20:
                buffer = bytearray(b"x" * length)
                with pytest.raises(OutOfRangeError, match=str(guest_offset)):
                    await access.read(buffer, guest_offset)
                assert buffer == b"x" * length
                with pytest.raises(OutOfRangeError):
                    await access.readv([buffer, bytearray(0)], guest_offset)
                with pytest.raises(OutOfRangeError):
                    await access.write(buffer, guest_offset)
                with pytest.raises(OutOfRangeError):
                    await access.writev([buffer], guest_offset)
            for call in calls:
                with pytest.raises(OutOfRangeError):
                    await call(guest_offset, length)
        for call in calls:
            with pytest.raises(OutOfRangeError):
                await call(0, -1)
        for get in (access.get_mapping, access.get_shallow_mapping):
            for guest_offset, length in [(-1, 1), (0, 0), (0, -1)]:
                with pytest.raises(OutOfRangeError):
                    await get(guest_offset, length)
        if access.writable:
            with pytest.raises(OutOfRangeError):
                await access.resize(-1)
        assert opened.files() == before
        assert await read(access, 0, SIZE) == kind.contents


async def test_arguments_of_wrong_types(kind):
    opened = await kind.open(writable=kind.writable)
    before = opened.files()
    async with opened.access as access:
        for offset in ("0", 0.0, None):
            with pytest.raises(WrongTypeError):
                await access.read(bytearray(1), offset)
            with pytest.raises(WrongTypeError):
                await access.write(b"x", offset)
            with pytest.raises(WrongTypeError):
                await access.write_zeroes(offset, 1)
            with pytest.raises(WrongTypeError):
                await access.discard_to_zero(0, offset)
            with pytest.raises(WrongTypeError):
                await access.get_mapping(offset, 1)
            with pytest.raises(WrongTypeError):
                async for _ in access.map(offset):
                    pass
        for buffer in (b"read-only", "text", 5, None, memoryview(bytearray(9))[::2]):
            with pytest.raises(WrongTypeError):
                await access.read(buffer, 0)
            with pytest.raises(WrongTypeError):
                await access.readv([bytearray(1), buffer], 0)
        for vector in (IoVector([b"read-only"]), "text", 5, None):
            with pytest.raises(WrongTypeError):
                await access.readv(vector, 0)
        for buffer in ("text", 5, None, memoryview(b"abcdef")[::2]):
            with pytest.raises(WrongTypeError):
                await access.write(buffer, 0)
        if access.writable:
            for size, mode in [("1", PreallocateMode.NONE), (SIZE, "zero"), (1.5, None)]:
                with pytest.raises(WrongTypeError):
                    await access.resize(size, mode)
        assert opened.files() == before
    with pytest.raises(WrongTypeError):
        FormatAccess(opened.memories["image"])


async def test_changes_of_a_read_only_image(kind):
    opened = await kind.open()
    before = opened.files()
    async with opened.access as access:
        for change in (
            lambda: access.write(b"x", 0),
            lambda: access.writev([b"x"], 0),
            lambda: access.write_zeroes(0, 512),
            lambda: access.write_zeroes(0, 512, allocate=True),
            lambda: access.discard_to_any(0, 65536),
            lambda: access.discard_to_zero(0, 65536),
            lambda: access.discard_to_backing(0, 65536),
            lambda: access.ensure_data_mapping(0, 512),
            lambda: access.ensure_zero_mapping(0, 65536),
            lambda: access.resize(SIZE + 512),
        ):
            with pytest.raises(ReadOnlyError):
                await change()
        for change in (
            lambda: access.driver.writev([memoryview(b"x")], 0),
            lambda: access.driver.write_zeroes(0, 512),
            lambda: access.driver.ensure_data_mapping(0, 512, overwrite=False),
        ):
            if not kind.name.startswith("raw"):  # whose storage refuses by itself
                with pytest.raises(ReadOnlyError):
                    await change()
        assert not access.write_nowait(memoryview(b"x"), 0)
        await access.flush()
        await access.sync()
        assert opened.files() == before


@either_way
async def test_use_after_close(name, writable):
    kind = disk(name)
    opened = await kind.open(writable=writable)
    access = opened.access
    await access.close()
    for call in (
        lambda: access.read(bytearray(1), 0),
        lambda: access.readv([bytearray(1)], 0),
        lambda: access.write(b"x", 0),
        lambda: access.write_zeroes(0, 1),
        lambda: access.discard_to_any(0, 1),
        lambda: access.discard_to_zero(0, 1),
        lambda: access.discard_to_backing(0, 1),
        lambda: access.get_mapping(0, 1),
        lambda: access.get_shallow_mapping(0, 1),
        lambda: access.ensure_data_mapping(0, 1),
        lambda: access.ensure_zero_mapping(0, 1),
        lambda: access.resize(SIZE),
        access.flush,
        access.sync,
        access.invalidate_cache,
        lambda: anext(access.map()),
    ):
        with pytest.raises(ClosedError):
            await call()


async def test_a_failing_storage(kind):
    """An error comes as StorageError, spoils nothing, and the next read is right."""
    faulty = {}

    def wrap(storage):
        faulty[storage] = FaultyStorage(storage)
        return faulty[storage]

    opened = await kind.open(wrap=wrap)
    async with opened.access as access:
        failures = 0
        for nth in range(1, 6):
            await access.invalidate_cache()
            for storage in faulty.values():
                storage.calls.clear()
                storage.kind, storage.nth = "read", nth
            try:
                assert await read(access, 0, SIZE) == kind.contents
            except StorageError:
                failures += 1
            for storage in faulty.values():
                storage.kind = None
            assert await read(access, 0, SIZE) == kind.contents
        assert failures


@pytest.mark.parametrize("name", ["raw", *(name for name in QCOW2 if "data" not in name)])
async def test_a_storage_that_ends_early(name, tmp_path):
    """What is missing from a file is an error, not zeroes that nobody wrote."""
    kind = disk(name)
    path = tmp_path / "image"
    path.write_bytes(kind.files["image"])
    storage = await FileStorage.open(path)
    is_raw = name == "raw"
    driver = Raw(storage, size=SIZE) if is_raw else await Qcow2.open(storage, backing=None)
    async with FormatAccess(driver) as access:
        with open(path, "r+b") as file:
            file.truncate(len(kind.files["image"]) // 8 // 512 * 512)
        with pytest.raises(StorageError):
            await read(access, 0, SIZE)


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
