"""What every writable format promises to those who change an image, over all of them."""

import random

import pytest
import trio

from imagofs import (
    ImagofsError,
    OutOfRangeError,
    PreallocateMode,
    RawMapping,
    UnsupportedError,
    ZeroMapping,
)
from tests.format.formats import SIZE, WRITABLE, disk, read, reopened
from tests.support.storages import RecordingStorage, SlowStorage, StrictStorage

#: What holds zeroes and nothing else: the ZERO extent of the flat VMDK.
FIXED_ZEROES = range(200_192, 200_192 + 70 * 512)


@pytest.fixture(params=WRITABLE)
def kind(request):
    return disk(request.param)


@pytest.fixture(params=[name for name in WRITABLE if name.startswith("qcow2")])
def layered(request):
    return disk(request.param)


async def finish(kind, opened, model):
    """See that the image has these contents, before and after it is closed."""
    assert await read(opened.access) == model
    await opened.access.close()
    assert await reopened(kind, opened) == model
    kind.check(opened.files())


def ranges(kind, count, seed):
    """Ranges that may be written: many around the edges of clusters, some large."""
    numbers = random.Random(seed)
    while count:
        unit = numbers.choice([1, 512, 4096, 65536])
        start = min(SIZE - 1, numbers.randrange(SIZE) // unit * unit)
        length = min(SIZE - start, numbers.choice([1, 100, 512, 4096, 65536, 150_000]))
        if kind.name != "vmdk-flat" or not (start < FIXED_ZEROES.stop and start + length > 200_192):
            count -= 1
            yield start, length


@pytest.mark.parametrize("seed", range(3))
async def test_any_changes(kind, seed):
    """Writes, zeroes and discards in any order; what is read is what was meant."""
    opened = await kind.open(writable=True)
    access = opened.access
    model = bytearray(kind.contents)
    numbers = random.Random(seed)
    for start, length in ranges(kind, 60, seed):
        stop = start + length
        match numbers.randrange(8):
            case 0 | 1:
                data = numbers.randbytes(length)
                await access.write(data, start)
                model[start:stop] = data
            case 2:
                data = numbers.randbytes(length)
                cut = numbers.randrange(length + 1)
                await access.writev([data[:cut], b"", memoryview(data)[cut:]], start)
                model[start:stop] = data
            case 3:
                await access.write_zeroes(start, length)
                model[start:stop] = bytes(length)
            case 4:
                await access.write_zeroes(start, length, allocate=True)
                model[start:stop] = bytes(length)
            case 5:
                await access.discard_to_zero(start, length)
                model[start:stop] = bytes(length)
            case 6:
                # Undefined inside, but nothing else than what was there, or zeroes; nothing around.
                await access.discard_to_any(start, length)
                now = await read(access, start, length)
                if kind.is_qcow2:
                    old = model[start:stop]
                    assert all(new in (0, was) for new, was in zip(now, old, strict=True))
                model[start:stop] = now
            case 7 if access.writable and kind.below is not None:
                await access.discard_to_backing(start, length)
                now = await read(access, start, length)
                below = kind.below[start:stop]
                old = model[start:stop]
                pairs = zip(now, below, old, strict=True)
                assert all(new in (new_below, was) for new, new_below, was in pairs)
                model[start:stop] = now
        if numbers.randrange(10) == 0:
            await access.flush()
    await finish(kind, opened, model)


async def test_whole_clusters_show_what_is_below(layered):
    opened = await layered.open(writable=True)
    access = opened.access
    await access.write(b"x" * SIZE, 0)
    await access.discard_to_backing(0, SIZE)
    assert await read(access) == layered.below
    mapping = await access.get_shallow_mapping(0, 1)
    assert not isinstance(mapping, RawMapping)
    await finish(layered, opened, layered.below)


@pytest.mark.parametrize("name", [name for name in WRITABLE if not name.startswith("qcow2")])
async def test_without_layers_nothing_is_below(name):
    opened = await disk(name).open(writable=True)
    async with opened.access as access:
        with pytest.raises(UnsupportedError):
            await access.discard_to_backing(0, 512)
        assert await read(access) == disk(name).contents


async def test_freed_space_is_given_back_and_used_again(layered):
    if "data" in layered.name:
        large = "data"
    else:
        large = "image"
    opened = await layered.open(writable=True)
    memory = opened.memories[large]
    await opened.access.write(b"x" * SIZE, 0)
    await opened.access.sync()
    full, length = memory.allocated_bytes(), memory.size()
    await opened.access.discard_to_zero(0, SIZE)
    await opened.access.sync()
    # Clusters of the small one do not fill a page of memory; version 2 cannot say zero.
    if layered.name not in ("qcow2-small", "qcow2-v2-backing"):
        assert memory.allocated_bytes() <= full - SIZE // 2
    await opened.access.write(b"y" * SIZE, 0)
    assert memory.size() <= length + 65536
    await finish(layered, opened, b"y" * SIZE)


async def test_zero_length_changes_nothing(kind):
    opened = await kind.open(writable=True)
    before = opened.files()
    for guest_offset in (0, 1, SIZE):
        await opened.access.write(b"", guest_offset)
        await opened.access.writev([], guest_offset)
        await opened.access.write_zeroes(guest_offset, 0)
        await opened.access.discard_to_any(guest_offset, 0)
        await opened.access.discard_to_zero(guest_offset, 0)
        await opened.access.discard_to_backing(guest_offset, 0)
        with pytest.raises(OutOfRangeError):
            await opened.access.ensure_data_mapping(guest_offset, 0)
    assert opened.files() == before
    await opened.access.close()


async def test_layers_below_are_never_written(layered):
    if layered.below == bytes(SIZE):
        assert "base" not in layered.files
        return
    opened = await layered.open(writable=True)
    await opened.access.write(b"x" * SIZE, 0)
    await opened.access.discard_to_backing(0, SIZE)
    await opened.access.close()
    for name in ("base", "middle"):
        if name in layered.files:
            assert opened.files()[name] == layered.files[name]


# --- mappings to write through --------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
async def test_writing_through_a_data_mapping(kind, overwrite):
    opened = await kind.open(writable=True)
    access = opened.access
    model = bytearray(kind.contents)
    for start, length in ranges(kind, 12, 5):
        position, end = start, start + length
        while position < end:
            mapping = await access.ensure_data_mapping(
                position, end - position, overwrite=overwrite
            )
            assert isinstance(mapping, RawMapping)
            assert mapping.writable
            assert 0 < mapping.length <= end - position
            assert mapping.storage in access.driver.data_storages
            if not overwrite:
                assert await read(access, position, mapping.length) == bytes(
                    model[position : position + mapping.length]
                )
            data = random.Random(position).randbytes(mapping.length)
            await mapping.storage.write(data, mapping.offset)
            model[position : position + mapping.length] = data
            position += mapping.length
        # Mapped once, the same place is found again.
        again = await access.ensure_data_mapping(start, 1)
        found = await access.get_mapping(start, 1)
        assert isinstance(found, RawMapping)
        assert (found.storage, found.offset) == (again.storage, again.offset)
    await finish(kind, opened, model)


async def test_zero_mappings_write_no_data(kind):
    logs = {}

    def wrap(storage):
        recording = RecordingStorage(storage)
        logs[storage] = recording.log
        return recording

    opened = await kind.open(writable=True, wrap=wrap)
    access = opened.access
    unit = access.driver.zero_granularity
    if unit is None:
        with pytest.raises(UnsupportedError):
            await access.ensure_zero_mapping(0, SIZE)
        await finish(kind, opened, kind.contents)
        return
    await access.write(b"x", 0)  # what the first write brings with it is not this test's subject
    model = bytearray(b"x" + kind.contents[1:])
    for log in logs.values():
        log.records.clear()
    for start, length in [(1, SIZE - 1), (0, unit), (unit, unit - 1), (SIZE - 1, 1)]:
        start = min(start, SIZE - 1)
        length = min(length, SIZE - start)
        first, zeroed = await access.ensure_zero_mapping(start, length)
        whole = -(-start // unit) * unit
        end = start + length if start + length == SIZE else (start + length) // unit * unit
        if whole < end:
            assert (first, zeroed) == (whole, end - whole)
            model[first : first + zeroed] = bytes(zeroed)
        else:
            assert (first, zeroed) == (start, 0)
    written = [record for log in logs.values() for record in log.records if record.kind == "write"]
    assert not written
    if kind.is_qcow2:
        assert isinstance(await access.get_shallow_mapping(min(unit, SIZE) - 1, 1), ZeroMapping)
    await finish(kind, opened, model)


# --- listeners ------------------------------------------------------------------------------------


async def test_listeners_hear_of_every_changed_mapping(kind):
    opened = await kind.open(writable=True)
    access, driver = opened.access, opened.access.driver
    heard = []
    driver.subscribe(lambda guest_offset, length: heard.append((guest_offset, length)))

    async def places():
        found = {}
        for guest_offset in range(0, SIZE, 512):
            mapping = await driver.get_mapping(guest_offset, 512)
            # How far a mapping reaches is no part of it.
            place = [getattr(mapping, name, None) for name in ("storage", "offset", "writable")]
            found[guest_offset] = (type(mapping), getattr(mapping, "explicit", None), *place)
        return found

    before = await places()
    numbers = random.Random(9)
    for start, length in ranges(kind, 25, 9):
        heard.clear()
        match numbers.randrange(4):
            case 0 | 1:
                await access.write(numbers.randbytes(length), start)
            case 2:
                await access.write_zeroes(start, length, allocate=bool(numbers.randrange(2)))
            case 3:
                await access.discard_to_zero(start, length)
        after = await places()
        changed = [offset for offset in after if after[offset] != before[offset]]
        for offset in changed:
            assert any(first <= offset < first + count for first, count in heard)
        before = after
    await access.close()


# --- durability -----------------------------------------------------------------------------------


async def test_what_is_flushed_is_found_by_another_reader(kind):
    opened = await kind.open(writable=True)
    model = bytearray(kind.contents)
    for start, length in ranges(kind, 10, 3):
        await opened.access.write(b"f" * length, start)
        model[start : start + length] = b"f" * length
        await opened.access.flush()
        assert await reopened(kind, opened) == model
    await finish(kind, opened, model)


async def test_what_is_synced_is_durable(kind):
    recordings = []

    def wrap(storage):
        recordings.append(RecordingStorage(storage))
        return recordings[-1]

    opened = await kind.open(writable=True, wrap=wrap)
    await opened.access.write(b"s" * 3000, 100)
    assert any(recording.log.at_risk() for recording in recordings)
    await opened.access.sync()
    # Decrements of refcounts may follow the last sync: lost, they are leaks. Data may not.
    data = [recording.log.at_risk() for recording in recordings if recording.writable]
    assert all(
        record.kind != "write" or len(record.data) <= 65536 for log in data for record in log
    )
    assert sum(len(log) for log in data) <= 2
    await opened.access.close()
    model = kind.contents[:100] + b"s" * 3000 + kind.contents[3100:]
    assert await reopened(kind, opened) == model


async def test_forgetting_what_is_cached(kind):
    opened = await kind.open(writable=True)
    await opened.access.write(b"x" * 70_000, 70_000)
    if kind.is_qcow2 and opened.access.driver.metadata.dirty_bytes():
        with pytest.raises(ImagofsError, match="flush"):
            await opened.access.invalidate_cache()
    else:
        assert kind.name != "qcow2"
    await opened.access.flush()
    await opened.access.invalidate_cache()
    model = kind.contents[:70_000] + b"x" * 70_000 + kind.contents[140_000:]
    await finish(kind, opened, model)


# --- sizes ----------------------------------------------------------------------------------------


async def test_resizing(kind):
    opened = await kind.open(writable=True)
    access = opened.access
    if kind.name.startswith(("vmdk", "raw-window")):
        for size in (0, SIZE - 512, SIZE + 512):
            with pytest.raises(UnsupportedError):
                await access.resize(size)
        await finish(kind, opened, kind.contents)
        return
    await access.resize(SIZE + 100 * 512)
    assert access.size() == access.driver.size() == SIZE + 100 * 512
    assert await read(access, 0, access.size()) == kind.contents + bytes(100 * 512)
    await access.write(b"end", access.size() - 3)
    with pytest.raises(OutOfRangeError):
        await access.write(b"end", access.size() - 2)
    await access.resize(300 << 10)
    with pytest.raises(OutOfRangeError):
        await read(access, 300 << 10, 1)
    await access.resize(SIZE, PreallocateMode.ZERO)
    model = kind.contents[: 300 << 10] + bytes(SIZE - (300 << 10))
    await finish(kind, opened, model)


@pytest.mark.parametrize("size", [1 << 63, 1 << 70])
async def test_sizes_that_cannot_be(kind, size):
    opened = await kind.open(writable=True)
    with pytest.raises((OutOfRangeError, UnsupportedError)):
        await opened.access.resize(size)
    await finish(kind, opened, kind.contents)


# --- at the same time -----------------------------------------------------------------------------


async def test_writers_and_readers_of_different_ranges(kind):
    opened = await kind.open(writable=True, wrap=SlowStorage)
    access = opened.access
    model = bytearray(kind.contents)
    tasks = 8
    # Neighbours share clusters but no byte.
    edges = sorted(random.Random(6).sample(range(1, 200_000), tasks - 1))
    edges = [0, *edges, 200_000]

    async def work(number):
        start, stop = edges[number], edges[number + 1]
        numbers = random.Random(number)
        for _ in range(6):
            first = numbers.randrange(start, stop)
            length = min(stop - first, numbers.choice([1, 700, 5000, 30_000]))
            if numbers.randrange(4):
                data = numbers.randbytes(length)
                await access.write(data, first)
            else:
                data = bytes(length)
                await access.write_zeroes(first, length)
            model[first : first + length] = data
            assert await read(access, start, stop - start) == model[start:stop]

    async def flush():
        for _ in range(4):
            await access.flush()
            await access.sync()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush)
            for number in range(tasks):
                nursery.start_soon(work, number)
    await finish(kind, opened, model)


async def test_writes_to_one_range_follow_each_other(kind):
    """Each write lands as a whole, in some order."""
    opened = await kind.open(writable=True, wrap=SlowStorage)
    start, length = 65536 - 3000, 9000
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for value in range(1, 9):
                nursery.start_soon(opened.access.write, bytes([value]) * length, start)
    now = await read(opened.access, start, length)
    assert now in [bytes([value]) * length for value in range(1, 9)]
    model = kind.contents[:start] + now + kind.contents[start + length :]
    await finish(kind, opened, model)


async def test_large_writes_in_pieces(kind):
    opened = await kind.open(writable=True, wrap=SlowStorage)
    access = opened.access
    if kind.name.startswith(("vmdk", "raw-window")):
        await access.close()
        return  # they cannot grow to a size that is split
    await access.resize(9 << 20)
    access.write_parallelism = 3
    data = random.Random(8).randbytes(7 << 20)
    await access.write(data, 12_345)
    await access.writev([data[:5_000_000], data[5_000_000:]], 1 << 20)
    await access.resize(SIZE)
    model = kind.contents[:12_345] + data
    await finish(kind, opened, model[:SIZE])


async def test_storages_with_alignments(kind):
    def wrap(storage):
        return StrictStorage(storage, request=512, memory=512, zero=4096, discard=4096)

    opened = await kind.open(writable=True, wrap=wrap)
    model = bytearray(kind.contents)
    for start, length in ranges(kind, 15, 4):
        await opened.access.write(b"a" * length, start)
        model[start : start + length] = b"a" * length
    await finish(kind, opened, model)
