"""Requests that cannot be meant, and images that cannot serve them, over all formats."""

import pytest

from imagofs import (
    ClosedError,
    FileStorage,
    FormatAccess,
    IoVector,
    OutOfRangeError,
    PreallocateMode,
    Qcow2,
    Raw,
    ReadOnlyError,
    StorageError,
    WrongTypeError,
)
from tests.format.formats import NAMES, QCOW2, SIZE, WRITABLE, disk, read
from tests.support.storages import FaultyStorage


@pytest.fixture(params=NAMES)
def kind(request):
    return disk(request.param)


#: Each format as it can be opened: read-only, and for writing.
either_way = pytest.mark.parametrize(
    ("name", "writable"), [(name, False) for name in NAMES] + [(name, True) for name in WRITABLE]
)


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
