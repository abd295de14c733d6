"""The README's table for those who know imago: every name in it exists and does what it is for."""

import builtins
import inspect
import mmap
import os
import re
import sys
from collections import ChainMap

import pytest
import trio

import imagofs
from imagofs import (
    FORMATS,
    AllowDirectories,
    AnnotatedStorage,
    DenyImplicitOpenGate,
    DiscardTo,
    EofMapping,
    FileStorage,
    FormatAccess,
    FormatDriver,
    GateDeniedError,
    ImplicitOpenGate,
    IndirectMapping,
    IoBuffer,
    IoVector,
    IoVectorMut,
    MemoryStorage,
    NullStorage,
    OutOfRangeError,
    PermissiveImplicitOpenGate,
    PreallocateMode,
    Qcow2,
    Raw,
    RawMapping,
    Role,
    SpecialMapping,
    Storage,
    StorageCreateOptions,
    StorageError,
    StorageOpenOptions,
    SyncFormatAccess,
    UnsupportedError,
    Vmdk,
    ZeroMapping,
    create_image,
    open_image,
)
from tests import qemu
from tests.api.readme import imago_table
from tests.support.storages import StrictStorage
from tests.vmdk.build import pack_descriptor

TABLE = imago_table()
MIB = 1 << 20
OPEN = PermissiveImplicitOpenGate()

# Every public struct, enum and trait of imago 0.2.0 to 0.2.3, with all its features.
ITEMS = [
    "Annotated",
    "CommonStorageHelper",
    "DenyImplicitOpenGate",
    "DynStorage",
    "File",
    "Format",
    "FormatAccess",
    "FormatCreateBuilder",
    "FormatCreateBuilderBase",
    "FormatDriverBuilder",
    "FormatDriverBuilderBase",
    "FormatDriverInstance",
    "ImplicitOpenGate",
    "IoBuffer",
    "IoBufferMut",
    "IoBufferRef",
    "IoVector",
    "IoVectorMut",
    "Mapping",
    "Null",
    "PermissiveImplicitOpenGate",
    "PreallocateMode",
    "Qcow2",
    "Qcow2CreateBuilder",
    "Qcow2OpenBuilder",
    "RangeBlockedGuard",
    "Raw",
    "RawCreateBuilder",
    "RawOpenBuilder",
    "ShallowMapping",
    "Storage",
    "StorageCreateOptions",
    "StorageExt",
    "StorageOpenOptions",
    "SyncFormatAccess",
    "Vmdk",
    "VmdkOpenBuilder",
    "VolatileSliceGuard",
    "WrappedFormat",
    "storage::PreallocateMode",
]


def resolve(name):
    """What a dotted name of the table stands for."""
    first, *rest = name.split(".")
    found = getattr(imagofs, first) if hasattr(imagofs, first) else getattr(builtins, first)
    for part in rest:
        # Fields of slotted dataclasses and names that only have a type are found there.
        hints = [inspect.get_annotations(kind) for kind in getattr(found, "__mro__", ())]
        found = getattr(found, part, None) or ChainMap(*hints)[part]
    return found


def test_no_item_is_missing():
    assert sorted(item for row in TABLE for item in row) == ITEMS


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_counterparts_exist_and_are_tested(row):
    assert TABLE[row]
    for name in TABLE[row]:
        name, _, parameters = name.partition("(")
        assert resolve(name) is not None
        if parameters:
            known = inspect.signature(resolve(name)).parameters
            assert set(re.findall(r"(\w+)=", parameters)) <= set(known)
        for word in name.split(".")[:1]:
            assert word in imagofs.__all__ or word == "memoryview"
    behaviour = "test_" + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", row[0]).lower()
    assert hasattr(sys.modules[__name__], behaviour), f"{behaviour} is missing"


# --- storages -------------------------------------------------------------------------------------


class Reversed(Storage):
    """A driver of one's own: the bytes of another storage, last first."""

    def __init__(self, contents):
        self.bytes = bytearray(contents)
        self.writable = True

    def size(self):
        return len(self.bytes)

    async def pure_readv(self, views, offset):
        for view in views:
            part = self.bytes[::-1][offset : offset + view.nbytes]
            view[:] = part.ljust(view.nbytes, b"\0")
            offset += view.nbytes

    async def pure_writev(self, views, offset):
        flipped = self.bytes[::-1]
        for view in views:
            flipped[offset : offset + view.nbytes] = view
            offset += view.nbytes
        self.bytes = flipped[::-1]

    async def pure_write_zeroes(self, offset, length, *, allocated):
        await self.pure_writev([memoryview(bytes(length))], offset)

    async def pure_discard(self, offset, length):
        pass

    async def flush(self):
        pass

    async def sync(self):
        pass

    async def invalidate_cache(self):
        pass

    async def resize(self, size, preallocate=PreallocateMode.NONE):
        raise UnsupportedError("fixed")

    async def close(self):
        self.closed = True


async def test_storage(tmp_path):
    storage = Reversed(bytes(range(256)) * 16)
    image = FormatAccess(Raw(storage))
    async with image:
        got = bytearray(4)
        await image.read(got, 0)
        assert got == bytes([255, 254, 253, 252])
        await image.write_zeroes(1, 2)
        assert storage.bytes[-4:] == bytes([252, 0, 0, 255])
    assert storage.closed
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    async with await FileStorage.open(path) as file:
        assert file.filename == str(path)
        assert file.resolve_relative_path("other") == str(tmp_path / "other")
        assert (file.memory_alignment, file.request_alignment) == (1, 1)
    with pytest.raises(UnsupportedError):
        storage.resolve_relative_path("other")


async def test_storage_ext():
    storage = StrictStorage(MemoryStorage(bytes(range(256)) * 64))
    got, parts = bytearray(5), [bytearray(1), bytearray(2)]
    await storage.read(got, 3)
    assert got == bytes([3, 4, 5, 6, 7])
    await storage.read(parts, 5)
    assert parts == [bytes([5]), bytes([6, 7])]
    await storage.readv([memoryview(got)[:2]], 9)
    await storage.write([b"ab", memoryview(b"cd")], 1)
    await storage.writev([memoryview(b"!")], 0)
    await storage.write_zeroes(3, 1)
    await storage.write_allocated_zeroes(4, 1)
    await storage.discard(4096, 4096)
    await storage.read(got, 0)
    assert got == b"!ab\0\0"
    # A strong blocker keeps writers off, a weak one only strong ones.
    blockers = storage.write_blockers()
    async with blockers.strong(0, 4096):
        with trio.move_on_after(0.01) as scope:
            await storage.write(b"x", 10)
        assert scope.cancelled_caught
    async with blockers.weak(0, 4096):
        with trio.fail_after(5):
            await storage.write(bytes(4096), 4096)
            async with blockers.weak(0, 4096):
                pass
    await storage.read(got, 8)
    assert got[2] == 10


async def test_dyn_storage(tmp_path):
    # Four kinds of storage in one chain.
    path = qemu.create(tmp_path / "top.qcow2", "1M", writes=["write -P 5 64k 64k"])
    bottom = FormatAccess(Raw(Reversed(bytes([7]) * (256 << 10))))
    memory = MemoryStorage()
    await Qcow2.create(memory, MIB)
    middle = FormatAccess(
        await Qcow2.open(AnnotatedStorage(memory, "tag"), writable=True, backing=bottom)
    )
    await middle.write(bytes([6]) * 512, 512)
    image = FormatAccess(await Qcow2.open(path, backing=middle))
    got = bytearray(MIB)
    await image.read(got, 0)
    want = bytearray(MIB)
    want[: 256 << 10] = bytes([7]) * (256 << 10)
    want[512:1024] = bytes([6]) * 512
    want[64 << 10 : 128 << 10] = bytes([5]) * (64 << 10)
    assert got == want
    assert {type(storage) for storage in image.dependencies().storages} == {
        FileStorage,
        AnnotatedStorage,
        Reversed,
    }
    await image.close()
    assert memory.closed


async def test_common_storage_helper():
    storage = Reversed(bytes(4096))  # whose driver knows nothing of blockers
    async with storage.write_blockers().strong(0, 512):
        hold = storage.write_blockers().weak(511, 600)
        assert not hold.enter_nowait()
        assert storage.write_blockers().weak(512, 600).enter_nowait()


async def test_storage_open_options(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    async with await FileStorage.open(path, StorageOpenOptions()) as storage:
        assert not storage.writable
    options = StorageOpenOptions(writable=True, direct=True)
    async with await FileStorage.open(path, options) as storage:
        assert storage.writable
        assert storage.request_alignment >= 512
        await storage.write(b"x", 5000)
    assert path.read_bytes()[5000:5001] == b"x"
    storage = FileStorage.open_now(path, StorageOpenOptions())
    await storage.close()


async def test_storage_create_options(tmp_path):
    path = tmp_path / "new"
    options = StorageCreateOptions(size=MIB, preallocate=PreallocateMode.FULL_ALLOCATE)
    async with await FileStorage.create(path, options) as storage:
        assert storage.size() == MIB
        assert storage.writable
        assert storage.allocated_bytes() >= MIB
    with pytest.raises(StorageError):
        await FileStorage.create(path, options)
    readable = StorageOpenOptions()
    options = StorageCreateOptions(size=10, overwrite=True, open_options=readable, mode=0o600)
    async with await FileStorage.create(path, options) as storage:
        assert (storage.size(), storage.writable) == (10, False)


async def test_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    async with FileStorage.from_fd(os.open(path, os.O_RDONLY)) as storage:
        got = bytearray(8)
        await storage.read(got, 0)
        assert got == b"hello\0\0\0"


async def test_null():
    async with NullStorage(MIB) as storage:
        await storage.write(b"x", 0)
        got = bytearray(b"y" * 10)
        await storage.read(got, 0)
        assert got == bytes(10)
        assert storage.size() == MIB


async def test_annotated():
    storage = AnnotatedStorage(MemoryStorage(MIB), ("bus", 3))
    async with FormatAccess(Raw(storage)) as image:
        mapping = await image.get_mapping(512, 512)
        assert isinstance(mapping, RawMapping)
        assert mapping.storage is storage
        assert mapping.storage.tag == ("bus", 3)


# --- buffers --------------------------------------------------------------------------------------


async def test_io_vector():
    vector = IoVector([b"abc", b"", memoryview(b"defg")])
    vector.push(b"h")
    vector.insert(0, b"0")
    vector.append(IoVector([b"ij"]))
    assert (len(vector), vector.buffer_count, len(vector.views)) == (11, 5, 5)
    head, tail = vector.split_at(6)
    assert (head.to_bytes(), tail.to_bytes()) == (b"0abcde", b"fghij")
    assert vector.split_tail_at(1).to_bytes() == b"abcdefghij"
    assert vector.to_bytes() == b"0"
    target = bytearray(6)
    head.copy_into(target)
    assert target == b"0abcde"
    storage = MemoryStorage(512)
    async with FormatAccess(Raw(storage)) as image:
        await image.writev(head, 7)
    assert storage.to_bytes()[7:13] == b"0abcde"


async def test_io_vector_mut():
    first, second = bytearray(3), bytearray(4)
    vector = IoVectorMut([first, second])
    vector.copy_from(b"abcdefg")
    assert [first, second] == [b"abc", b"defg"]
    vector.fill(255)
    assert [first, second] == [b"\xff" * 3, b"\xff" * 4]
    async with FormatAccess(Raw(MemoryStorage(bytes(range(100))))) as image:
        await image.readv(vector, 10)
    assert first + second == bytes(range(10, 17))
    with pytest.raises(TypeError):
        vector.push(b"read-only")
    assert isinstance(vector, IoVector)


async def test_volatile_slice_guard():
    # A guest's memory: an image is read into it and written from it, without a copy in between.
    with mmap.mmap(-1, 64 << 10) as memory:
        guest = memoryview(memory)
        slices = [guest[4096:5120], guest[100:200], guest[9000:9412]]
        storage = MemoryStorage(bytes(range(256)) * 16)
        async with FormatAccess(Raw(storage)) as image:
            await image.readv(IoVectorMut(slices), 256)
            assert memory[4096:5120] == bytes(range(256)) * 4
            memory[100:200] = b"x" * 100
            await image.writev(IoVector([guest[100:200]]), 0)
        assert storage.to_bytes()[:100] == b"x" * 100
        for part in (*slices, guest):
            part.release()


async def test_io_buffer(tmp_path):
    buffer = IoBuffer(8192, 4096)
    assert len(buffer) == 8192
    assert IoVector([buffer]).is_aligned(4096, 4096)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    options = StorageOpenOptions(direct=True)
    async with await FileStorage.open(path, options) as storage:
        assert storage.memory_alignment <= 4096
        await storage.read(buffer, 4096)
    assert buffer[:256] == bytes(range(256))
    copy = IoBuffer.copy_of([b"ab", memoryview(b"cde")])
    assert copy[:] == b"abcde"
    for size, alignment in [(0, 1), (-1, 1), (1, 0), (1, 3), (1, 2 * mmap.PAGESIZE), (1 << 80, 1)]:
        with pytest.raises(OutOfRangeError):
            IoBuffer(size, alignment)
    with pytest.raises(TypeError):
        IoBuffer("1")  # type: ignore[arg-type]
    with pytest.raises(OutOfRangeError):
        IoBuffer.copy_of([])


def test_io_buffer_ref():
    buffer = IoBuffer.copy_of(b"abcdef")
    with memoryview(buffer) as view, view[1:3] as part, part.cast("H") as numbers:
        assert bytes(part) == b"bc"
        part[:] = b"BC"
        assert numbers.tolist() == [int.from_bytes(b"BC", sys.byteorder)]
    assert buffer[:] == b"aBCdef"


# --- formats --------------------------------------------------------------------------------------


async def test_format():
    assert list(FORMATS) == ["qcow2", "vmdk", "raw"]
    drivers: dict[str, type[FormatDriver]] = {"qcow2": Qcow2, "vmdk": Vmdk, "raw": Raw}
    for name, format in FORMATS.items():
        assert format.name == name
        assert callable(format.opener())
        assert drivers[name].format_name == name
    assert FORMATS["qcow2"].recognises(b"QFI\xfb")
    assert not FORMATS["qcow2"].recognises(b"")


async def test_format_driver_instance():
    memory = MemoryStorage()
    await Qcow2.create(memory, MIB)
    assert await Qcow2.probe(memory)
    assert not await Vmdk.probe(memory)
    assert await Raw.probe(memory)
    assert await Vmdk.probe(MemoryStorage(pack_descriptor()))
    assert not await Qcow2.probe(MemoryStorage())
    driver = await Qcow2.open(memory, writable=True)
    assert (driver.format_name, driver.size(), driver.writable) == ("qcow2", MIB, True)
    assert driver.storages == (memory,)
    assert driver.zero_granularity == 65536
    assert await driver.get_mapping(0, 10) == ZeroMapping(10, explicit=False)
    await driver.writev([memoryview(b"abc")], 0)
    mapping = await driver.ensure_data_mapping(0, 512, overwrite=False)
    assert (mapping.storage, mapping.length, mapping.writable) == (memory, 512, True)
    await driver.write_zeroes(0, 65536)
    await driver.discard(0, 65536, DiscardTo.BACKING)
    await driver.resize(2 * MIB)
    await driver.flush()
    await driver.sync()
    await driver.invalidate_cache()
    with pytest.raises(UnsupportedError):
        await Raw(MemoryStorage(512)).readv_special([memoryview(bytearray(1))], 0)
    await driver.close()


async def test_format_driver_builder(tmp_path):
    path = tmp_path / "flat"
    path.write_bytes(b"a" * 1024 + b"b" * 1024)
    (tmp_path / "disk.vmdk").write_bytes(pack_descriptor('RW 4 FLAT "flat" 0'))
    for driver in (
        await Raw.open(path),
        await Vmdk.open(tmp_path / "disk.vmdk", gate=OPEN),
        await Raw.open(path, offset=0, size=2048, gate=DenyImplicitOpenGate()),
        await Raw.open(await FileStorage.open(path)),
    ):
        async with FormatAccess(driver) as image:
            got = bytearray(2048)
            await image.read(got, 0)
            assert got == path.read_bytes()
    options = StorageOpenOptions(direct=True)
    image = await open_image(path, format="raw", writable=True, storage_options=options)
    async with image:
        assert image.writable
        assert image.request_alignment >= 512


async def test_qcow2_open_builder(tmp_path):
    base = qemu.create(tmp_path / "base.qcow2", "1M", writes=["write -P 1 0 1M"])
    top = qemu.create(tmp_path / "top.qcow2", backing=base, writes=["write -P 2 0 64k"])

    async def last_byte(**how):
        async with FormatAccess(await Qcow2.open(top, **how)) as image:
            got = bytearray(1)
            await image.read(got, MIB - 1)
            return got[0]

    assert await last_byte(gate=OPEN, backing=imagofs.FROM_HEADER) == 1
    assert await last_byte(backing=None) == 0
    other = FormatAccess(Raw(MemoryStorage(bytes([9]) * MIB)))
    assert await last_byte(backing=other) == 9
    with pytest.raises(GateDeniedError, match="gate=PermissiveImplicitOpenGate"):
        await last_byte()
    # A data file of one's own in the place of the one that the header names.
    data = tmp_path / "data"
    image = qemu.create(tmp_path / "image.qcow2", "1M", data_file=str(data))
    memory = MemoryStorage(MIB)
    async with FormatAccess(await Qcow2.open(image, writable=True, data_file=memory)) as access:
        await access.write(b"abc", 65536)
    assert memory.to_bytes()[65536:65539] == b"abc"
    assert data.read_bytes() == bytes(MIB)


async def test_format_create_builder(tmp_path):
    for path, format in [(tmp_path / "a.qcow2", "qcow2"), (tmp_path / "a.raw", "raw")]:
        await create_image(path, format, MIB, preallocate=PreallocateMode.WRITE_DATA)
        async with await open_image(path, format=format, gate=OPEN) as image:
            assert (image.size(), image.format_name) == (MIB, format)
    memory = MemoryStorage()
    await Raw.create(memory, 1000)
    assert memory.size() == 1024
    await Raw.create(tmp_path / "b.raw", 512, mode=0o600)
    assert (tmp_path / "b.raw").stat().st_size == 512


async def test_qcow2_create_builder(tmp_path):
    path = tmp_path / "image.qcow2"
    await Qcow2.create(
        path,
        MIB,
        cluster_size=4096,
        refcount_bits=64,
        data_file=str(tmp_path / "data"),
        data_file_raw=True,
    )
    facts = qemu.info(path)
    assert facts["cluster-size"] == 4096
    assert facts["format-specific"]["data"]["refcount-bits"] == 64
    assert facts["format-specific"]["data"]["data-file-raw"]
    qemu.check(path)


# --- access ---------------------------------------------------------------------------------------


async def test_format_access():
    memory = MemoryStorage()
    await Qcow2.create(memory, 64 * MIB)
    below = FormatAccess(Raw(MemoryStorage(bytes([3]) * MIB)))
    driver = await Qcow2.open(memory, writable=True, backing=below)
    async with FormatAccess(driver) as image:
        assert image.driver is driver
        assert image.size() == 64 * MIB
        assert image.is_writable
        assert image.dependencies().layers == (driver, below.driver)
        assert image.dependencies().storages == (memory, *below.storages())
        assert (image.memory_alignment, image.request_alignment) == (1, 1)
        data = os.urandom(5 * MIB + 123)
        image.read_parallelism, image.write_parallelism = 3, 4
        await image.write(data, MIB + 5)
        got = bytearray(len(data))
        await image.read(got, MIB + 5)
        assert got == data
        await image.writev([b"ab", b"c"], 0)
        parts = [bytearray(2), bytearray(2)]
        await image.readv(parts, 0)
        assert parts == [b"ab", b"c\3"]
        assert isinstance(await image.get_mapping(0, 1), RawMapping)
        assert isinstance(await image.get_shallow_mapping(512 << 10, 1), IndirectMapping)
        assert [step async for step in image.map(32 * MIB)] == [
            (32 * MIB, ZeroMapping(32 * MIB, explicit=False))
        ]
        mapping = await image.ensure_data_mapping(0, 512)
        await mapping.storage.write(b"XYZ", mapping.offset)
        await image.read(parts[0], 0)
        assert parts[0] == b"XY"
        assert await image.ensure_zero_mapping(1, 3 * 65536) == (65536, 2 * 65536)
        assert await image.ensure_zero_mapping(1, 65536) == (1, 0)
        assert await image.get_shallow_mapping(65536, MIB) == ZeroMapping(131072, explicit=True)
        await image.write_zeroes(0, 3)
        await image.discard_to_zero(0, 65536)
        await image.discard_to_any(65536, 65536)
        await image.discard_to_backing(0, 65536)
        await image.read(parts[0], 0)
        assert parts[0] == b"\3\3"
        await image.flush()
        await image.sync()
        await image.invalidate_cache()
        await image.resize(65 * MIB, PreallocateMode.FORMAT_ALLOCATE)
        assert isinstance(await image.get_shallow_mapping(64 * MIB, 1), RawMapping)
        await image.resize(32 * MIB)
        assert image.size() == 32 * MIB
        for wrong in (0, -1):
            with pytest.raises(OutOfRangeError):
                image.read_parallelism = wrong
            with pytest.raises(OutOfRangeError):
                image.write_parallelism = wrong


async def test_mapping(tmp_path):
    path = qemu.create(
        tmp_path / "image.qcow2", "1M", writes=["write -P 1 0 64k", "write -z 64k 64k"]
    )
    flat = tmp_path / "compressed.qcow2"
    qemu.qemu_img("convert", "-c", "-O", "qcow2", path, flat)
    async with await open_image(path) as image:
        raw = await image.get_mapping(10, 1 << 20)
        assert isinstance(raw, RawMapping)
        assert raw.storage is image.storages()[0]
        assert path.read_bytes()[raw.offset : raw.offset + raw.length] == b"\1" * (65536 - 10)
        assert await image.get_mapping(65536, 100) == ZeroMapping(100, explicit=True)
        assert await image.get_mapping(131072, 100) == ZeroMapping(100, explicit=False)
        assert await image.get_mapping(MIB, 100) == EofMapping(0)
    async with await open_image(flat) as image:
        assert await image.get_mapping(512, 100) == SpecialMapping(100, image.driver, 512)


async def test_shallow_mapping():
    below = FormatAccess(Raw(MemoryStorage(512)))
    memory = MemoryStorage()
    await Qcow2.create(memory, MIB)
    async with FormatAccess(await Qcow2.open(memory, backing=below)) as image:
        assert await image.get_shallow_mapping(3, 5) == IndirectMapping(5, below, 3)
        # Resolved, the end of the layer below reads as zero.
        assert await image.get_mapping(600, 5) == ZeroMapping(5, explicit=False)


async def test_preallocate_mode(tmp_path):
    taken = {}
    for mode in PreallocateMode:
        path = tmp_path / mode.value
        async with await FileStorage.create(path) as storage:
            await Qcow2.create(storage, 0)
            async with FormatAccess(await Qcow2.open(path, writable=True)) as image:
                await image.resize(MIB, mode)
                taken[mode] = image.allocated_bytes()
                allocated = isinstance(await image.get_mapping(0, 1), RawMapping)
                assert allocated == (
                    mode not in (PreallocateMode.NONE, PreallocateMode.ZERO)
                ) or isinstance(await image.get_mapping(0, 1), ZeroMapping)
    assert taken[PreallocateMode.NONE] < MIB <= taken[PreallocateMode.FULL_ALLOCATE]
    assert taken[PreallocateMode.WRITE_DATA] >= MIB


# --- gates ----------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path):
    qemu.create(tmp_path / "base.raw", "1M", fmt="raw")
    return qemu.create(tmp_path / "top.qcow2", backing="base.raw", backing_fmt="raw")


async def test_implicit_open_gate(chain):
    asked = []

    class Asking(ImplicitOpenGate):
        def check(self, request):
            asked.append(request)

    await (await open_image(chain, gate=Asking())).close()
    assert len(asked) == 1
    request = asked[0]
    assert (request.image, request.name) == (str(chain), "base.raw")
    assert request.path == str((chain.parent / "base.raw").resolve())
    assert (request.role, request.format, request.format_guessed) == (Role.BACKING, "raw", False)
    assert (request.writable, request.depth) == (False, 1)


async def test_permissive_implicit_open_gate(chain, tmp_path):
    async with await open_image(chain, gate=OPEN) as image:
        assert len(image.layers()) == 2
    async with await open_image(chain, gate=AllowDirectories([tmp_path])) as image:
        assert len(image.layers()) == 2


async def test_deny_implicit_open_gate(chain, tmp_path):
    with pytest.raises(GateDeniedError, match=r"base\.raw"):
        await open_image(chain, gate=DenyImplicitOpenGate())
    with pytest.raises(GateDeniedError, match=r"gate=PermissiveImplicitOpenGate"):
        await open_image(chain)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(GateDeniedError, match="not below"):
        await open_image(chain, gate=AllowDirectories([tmp_path / "elsewhere"]))
    async with await open_image(tmp_path / "base.raw", gate=DenyImplicitOpenGate()):
        pass


async def test_wrapped_format():
    # One layer below two images; it is closed with the last of them.
    storage = MemoryStorage(bytes([4]) * MIB)
    shared = FormatAccess(Raw(storage))
    images = []
    for _ in range(2):
        memory = MemoryStorage()
        await Qcow2.create(memory, MIB)
        images.append(FormatAccess(await Qcow2.open(memory, writable=True, backing=shared)))
    first, second = images
    await first.write(b"\1", 0)
    await first.close()
    assert [storage.closed, shared.closed] == [False, False]
    got = bytearray(2)
    await second.read(got, 0)
    assert got == b"\4\4"
    await second.close()
    assert [storage.closed, shared.closed] == [True, True]


def test_sync_format_access(tmp_path):
    path = qemu.create(tmp_path / "image.qcow2", "1M", writes=["write -P 1 0 64k"])
    with SyncFormatAccess.open(path, writable=True) as image:
        assert image.access.size() == MIB
        got = bytearray(3)
        image.read(got, 65535)
        assert got == b"\1\0\0"
        image.write(b"abc", 512)
    assert qemu.contents(path)[512:515] == b"abc"
    # What answers at once, or lends what the caches hold, is for those in the loop itself.
    not_blocking = (
        "driver",
        "read_nowait",
        "write_nowait",
        "prepare_write_nowait",
        "lend",
        "lend_nowait",
        "cached_ranges",
        "file_ranges",
        "likely_ranges",
    )
    for name in dir(FormatAccess):
        if not name.startswith("_") and name not in not_blocking:
            assert hasattr(SyncFormatAccess, name), name


# --- drivers --------------------------------------------------------------------------------------


async def test_qcow2(chain):
    driver = await Qcow2.open(chain, gate=OPEN)
    header = driver.header
    assert (header.backing_file, header.backing_format) == ("base.raw", "raw")
    assert (header.data_file, header.has_data_file) == (None, False)
    result = await driver.check()
    assert not result.corruptions
    await FormatAccess(driver).close()


async def test_raw():
    storage = MemoryStorage(bytes(range(200)))
    async with FormatAccess(Raw(storage, offset=100, size=50)) as image:
        got = bytearray(50)
        await image.read(got, 0)
        assert got == bytes(range(100, 150))
        assert image.size() == 50
        await image.write(b"x", 49)
        with pytest.raises(OutOfRangeError):
            await image.write(b"xy", 49)
        with pytest.raises(UnsupportedError):
            await image.resize(60)
    assert storage.to_bytes()[149:151] == b"x" + bytes([150])


async def test_vmdk(tmp_path):
    # Offsets of extents count sectors.
    (tmp_path / "flat").write_bytes(bytes(512) + b"a" * 512)
    path = tmp_path / "disk.vmdk"
    path.write_bytes(pack_descriptor('RW 1 FLAT "flat" 1', "RW 1 ZERO"))
    async with FormatAccess(await Vmdk.open(path, gate=OPEN, writable=True)) as image:
        got = bytearray(1024)
        await image.read(got, 0)
        assert got == b"a" * 512 + bytes(512)
        await image.write(b"b", 0)
    assert (tmp_path / "flat").read_bytes()[512:514] == b"ba"
