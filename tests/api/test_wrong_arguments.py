"""Arguments of types that cannot be meant: an error of the hierarchy, and nothing is changed."""

# mypy: disable-error-code="arg-type, assignment, comparison-overlap, list-item, operator"
import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagofs import (
    AllowDirectories,
    AnnotatedStorage,
    FileStorage,
    FormatAccess,
    ImagofsError,
    IoBuffer,
    IoVector,
    IoVectorMut,
    LockedError,
    MemoryStorage,
    NullStorage,
    OutOfRangeError,
    PreallocateMode,
    Qcow2,
    Raw,
    ReadOnlyError,
    StorageCreateOptions,
    StorageError,
    StorageOpenOptions,
    SyncFormatAccess,
    UnsupportedError,
    Vmdk,
    WrongTypeError,
    create_image,
    open_image,
)
from tests.vmdk.build import pack_descriptor

MIB = 1 << 20


def _released() -> memoryview:
    view = memoryview(bytearray(5))
    view.release()
    return view


#: Calls without a file system, each with the error that it must raise.
PLAIN: dict[str, tuple[Callable[[], Any], type[ImagofsError]]] = {
    "memory of no kind": (lambda: MemoryStorage("5"), WrongTypeError),
    "memory of no size": (lambda: MemoryStorage(-1), OutOfRangeError),
    "null of a float": (lambda: NullStorage(1.5), WrongTypeError),
    "annotated number": (lambda: AnnotatedStorage(5, 1), WrongTypeError),
    "descriptor of no kind": (lambda: FileStorage.from_fd("x"), WrongTypeError),
    "negative descriptor": (lambda: FileStorage.from_fd(-1), StorageError),
    "huge descriptor": (lambda: FileStorage.from_fd(1 << 40), StorageError),
    "access of a number": (lambda: FormatAccess(5), WrongTypeError),
    "sync access of a number": (lambda: SyncFormatAccess(5), WrongTypeError),
    "raw number": (lambda: Raw(5), WrongTypeError),
    "raw at a string": (lambda: Raw(MemoryStorage(5), offset="1"), WrongTypeError),
    "raw of a float": (lambda: Raw(MemoryStorage(5), size=1.0), WrongTypeError),
    "raw that cannot be written": (
        lambda: Raw(MemoryStorage(5, writable=False), writable=True),
        ReadOnlyError,
    ),
    "no directory": (lambda: AllowDirectories(["/nonexistent"]), StorageError),
    "one directory": (lambda: AllowDirectories("/tmp"), WrongTypeError),
    "one directory's path": (lambda: AllowDirectories(Path("/tmp")), WrongTypeError),
    "directories of no kind": (lambda: AllowDirectories(5), WrongTypeError),
    "a directory without a name": (lambda: AllowDirectories([""]), StorageError),
    "a directory of no kind": (lambda: AllowDirectories([5]), WrongTypeError),
    "vector of a number": (lambda: IoVector(5), WrongTypeError),
    "vector of a string": (lambda: IoVector(["x"]), WrongTypeError),
    "vector of a released view": (lambda: IoVector([_released()]), WrongTypeError),
    "a released view": (lambda: IoBuffer.copy_of(_released()), WrongTypeError),
    "split at a string": (lambda: IoVector([b"x"]).split_at("1"), WrongTypeError),
    "split tail at a float": (lambda: IoVector([b"x"]).split_tail_at(1.0), WrongTypeError),
    "fill with a string": (lambda: IoVectorMut([bytearray(1)]).fill("x"), WrongTypeError),
    "fill with a float": (lambda: IoVectorMut([bytearray(1)]).fill(3.0), WrongTypeError),
    "append bytes": (lambda: IoVector([b"x"]).append(b"x"), WrongTypeError),
    "append a list": (lambda: IoVector([b"x"]).append([b"x"]), WrongTypeError),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_calls(name):
    call, error = PLAIN[name]
    with pytest.raises(error):
        call()


async def test_opening(tmp_path):
    path = tmp_path / "image.qcow2"
    await Qcow2.create(path, MIB)
    before = path.read_bytes()
    (tmp_path / "disk.vmdk").write_bytes(pack_descriptor("RW 4 ZERO"))
    for image in (5, b"/dev/null", None):
        for open_it in (open_image, Qcow2.open, Raw.open, Vmdk.open, FileStorage.open):
            with pytest.raises(WrongTypeError):
                await open_it(image)
    for open_it in (open_image, Qcow2.open, Raw.open, Vmdk.open):
        for wrong in ({"gate": 5}, {"storage_options": 5}, {"lock": "off"}):
            with pytest.raises(WrongTypeError):
                await open_it(path, **wrong)
    for wrong in ({"snapshot": 5}, {"metadata_bytes": "1"}, {"inflated_bytes": 1.5}):
        with pytest.raises(WrongTypeError):
            await open_image(path, **wrong)
    with pytest.raises(OutOfRangeError):
        await open_image(path, metadata_bytes=-1)
    for wrong in ({"backing": 5}, {"backing": Raw(NullStorage())}, {"data_file": "name"}):
        with pytest.raises(WrongTypeError):
            await Qcow2.open(path, **wrong)
    with pytest.raises(WrongTypeError):
        await Vmdk.open(tmp_path / "disk.vmdk", backing=5)
    with pytest.raises(UnsupportedError, match="no external data file"):
        await Qcow2.open(path, data_file=MemoryStorage(MIB))
    with pytest.raises(WrongTypeError):
        await FileStorage.open(path, StorageCreateOptions())
    assert path.read_bytes() == before


async def test_creating(tmp_path):
    path = tmp_path / "new"
    wrong: list[dict[str, Any]] = [
        {"size": "1M"},
        {"size": 1.5},
        {"preallocate": "full"},
        {"mode": "rw"},
        {"cluster_size": "64k"},
        {"cluster_size": 65536.0},
        {"refcount_bits": None},
        {"version": "3"},
        {"extended_l2": "off"},
        {"data_file_raw": 1},
        {"lazy_refcounts": "no"},
        {"compression_type": 0},
        {"data_file": tmp_path / "data"},
        {"backing_file": 5},
        {"backing_file": b"base"},
        {"backing_file": "base", "backing_format": 5},
        {"backing_file": "base", "backing_format": "raw", "gate": 5},
    ]
    for options in wrong:
        with pytest.raises(WrongTypeError):
            await create_image(path, "qcow2", **{"size": MIB, **options})
    for options in wrong[:4]:
        with pytest.raises(WrongTypeError):
            await create_image(path, "raw", **{"size": MIB, **options})
    for image in (5, b"name"):
        with pytest.raises(WrongTypeError):
            await create_image(image, "qcow2", MIB)
        with pytest.raises(WrongTypeError):
            await FileStorage.create(image)
    for create in (
        StorageCreateOptions(size="1"),
        StorageCreateOptions(preallocate="zero"),
        StorageOpenOptions(),
    ):
        with pytest.raises(WrongTypeError):
            await FileStorage.create(path, create)
    assert not path.exists()


async def test_buffers_of_any_kind_in_a_storage():
    for storage in (MemoryStorage(4096), AnnotatedStorage(MemoryStorage(4096), "tag")):
        await storage.writev([b"ab", bytearray(b"cd"), array.array("H", [0x6665])], 0)
        await storage.writev(IoVector([b"g", b"h"]), 6)
        numbers, last = array.array("I", [0]), bytearray(2)
        await storage.readv([numbers, last, bytearray(0)], 0)
        assert (numbers.tobytes(), last) == (b"abcd", b"ef")
        await storage.readv(IoVectorMut([last]), 6)
        assert last == b"gh"
        for wrong in ("text", 5, [5], ["x"], [memoryview(b"abcd")[::2]]):
            with pytest.raises(WrongTypeError):
                await storage.writev(wrong, 0)
            with pytest.raises(WrongTypeError):
                await storage.readv(wrong, 0)
        with pytest.raises(WrongTypeError):
            await storage.readv([b"read-only"], 0)
        for call in (storage.readv, storage.writev):
            with pytest.raises(WrongTypeError):
                await call([bytearray(1)], "0")
        with pytest.raises(WrongTypeError):
            await storage.extent_at("0")
        with pytest.raises(WrongTypeError):
            await storage.resize("0")


async def test_a_tagged_storage_has_the_write_blockers_of_the_inner_one():
    inner = MemoryStorage(4096)
    outer = AnnotatedStorage(inner, "tag")
    async with outer.write_blockers().strong(0, 512):
        assert not inner.write_blockers().weak(0, 1).enter_nowait()


# --- what is open read-only ---------------------------------------------------------------------


async def test_an_image_in_a_writable_storage_is_read_only_unless_it_is_opened_for_writing():
    for open_it in (Raw.open, open_image):
        opened = await open_it(
            MemoryStorage(MIB), **({"format": "raw"} if open_it is open_image else {})
        )
        image = opened if isinstance(opened, FormatAccess) else FormatAccess(opened)
        assert not image.writable
        with pytest.raises(ReadOnlyError):
            await image.write(b"x", 0)
        await image.close()
    async with FormatAccess(await Raw.open(MemoryStorage(MIB), writable=True)) as image:
        await image.write(b"x", 0)


async def test_a_read_only_storage_is_not_opened_for_writing(tmp_path):
    memory = MemoryStorage()
    await Qcow2.create(memory, MIB)
    contents = {
        "qcow2": memory.to_bytes(),
        "raw": bytes(MIB),
        "vmdk": pack_descriptor("RW 4 ZERO"),
    }
    for format, data in contents.items():
        storage = MemoryStorage(data, writable=False)
        with pytest.raises(ReadOnlyError):
            await open_image(storage, format=format, writable=True)
        assert storage.closed
    for open_it, data in zip((Qcow2.open, Raw.open, Vmdk.open), contents.values(), strict=True):
        storage = MemoryStorage(data, writable=False)
        with pytest.raises(ReadOnlyError):
            await open_it(storage, writable=True)
        assert storage.closed
    path = tmp_path / "image.qcow2"
    await Qcow2.create(path, MIB, data_file="data")
    with pytest.raises(ReadOnlyError):
        await Qcow2.open(path, writable=True, data_file=MemoryStorage(MIB, writable=False))


@pytest.mark.parametrize("tagged", [False, True])
async def test_an_open_storage_is_locked_too(tmp_path, tagged):
    path = tmp_path / "image.qcow2"
    await Qcow2.create(path, MIB)

    async def storage():
        file = await FileStorage.open(path, StorageOpenOptions(writable=True))
        return AnnotatedStorage(file, "tag") if tagged else file

    for open_it, format in ((Qcow2.open, {}), (open_image, {}), (Raw.open, {})):
        opened = await open_it(await storage(), writable=True, lock=True, **format)
        with pytest.raises(LockedError):
            await open_image(path, lock=True)
        second = await storage()
        with pytest.raises(LockedError):
            await open_image(second, lock=True)
        assert second.closed
        await opened.close()
    async with await open_image(path, lock=True):
        pass


async def test_preallocation_of_another_type_changes_nothing():
    memory = MemoryStorage()
    await Qcow2.create(memory, MIB)
    async with await open_image(memory, writable=True) as image:
        with pytest.raises(WrongTypeError):
            await image.resize(2 * MIB, "full")
        assert image.size() == MIB
        await image.resize(2 * MIB, PreallocateMode.ZERO)
        assert image.size() == 2 * MIB
