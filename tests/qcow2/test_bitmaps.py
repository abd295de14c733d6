"""Persistent bitmaps of an image that is written to: none stays marked as right that is wrong."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from imagofs import FileStorage, FormatAccess, Qcow2, StorageOpenOptions, open_image
from imagofs.format.qcow2.bitmaps import read_bitmaps
from imagofs.format.qcow2.loading import read_header
from tests import qemu
from tests.support.storages import RecordingStorage

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with data, zeroes, and two bitmaps that have something in them: one is disabled."""
    path = qemu.create(tmp_path / "image.qcow2", "8M", writes=["write -P 1 0 64k"])
    for name in ("recording", "resting"):
        qemu.qemu_img("bitmap", "--add", "-g", "64k", path, name)
    qemu.qemu_io(path, "write -P 2 64k 128k", "write -z 4M 64k")
    qemu.qemu_img("bitmap", "--disable", path, "resting")
    return path


def flags(path: Path) -> dict[str, list[str]]:
    bitmaps = qemu.info(path)["format-specific"]["data"]["bitmaps"]
    return {bitmap["name"]: sorted(bitmap["flags"]) for bitmap in bitmaps}


async def stored(path: Path, name: str) -> list[bytes]:
    """The clusters of a bitmap's contents, as they are in the file."""
    async with await FileStorage.open(path) as storage:
        header = await read_header(storage)
        bitmap = next(b for b in await read_bitmaps(storage, header) if b.name == name)
        table = await storage.read_table(bitmap.table_entries * 8, bitmap.table_offset)
        entries = [int.from_bytes(table[i : i + 8], "big") for i in range(0, len(table), 8)]
        data = [bytes(await storage.read_table(header.cluster_size, e)) for e in entries if e > 1]
        return [bytes(table), *data]


async def write_through_a_mapping(image: FormatAccess) -> None:
    mapping = await image.ensure_data_mapping(0, 512, overwrite=True)
    await mapping.storage.write(b"x" * 512, mapping.offset)


CHANGES: dict[str, Callable[[FormatAccess], Awaitable[object]]] = {
    "in place": lambda image: image.write(b"x" * 512, 0),
    "new cluster": lambda image: image.write(b"x", 2 * MIB),
    "zeroes": lambda image: image.write_zeroes(0, 65536),
    "allocated zeroes": lambda image: image.write_zeroes(2 * MIB, 65536, allocate=True),
    "zero mapping": lambda image: image.ensure_zero_mapping(0, 65536),
    "discard to any": lambda image: image.discard_to_any(0, 65536),
    "discard to zero": lambda image: image.discard_to_zero(0, 65536),
    "discard to backing": lambda image: image.discard_to_backing(0, 65536),
    "a mapping": write_through_a_mapping,
}


async def test_opening_for_writing_alone_changes_nothing(image: Path) -> None:
    before = image.read_bytes()
    async with await open_image(image, writable=True) as access:
        await access.read(bytearray(MIB), 0)
        await access.flush()
        assert not access.write_nowait(memoryview(b"x" * 512), 0)
    assert image.read_bytes() == before


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_makes_the_recording_one_wrong_and_says_so(image: Path, change: str) -> None:
    assert flags(image) == {"recording": ["auto"], "resting": []}
    resting = await stored(image, "resting")
    assert len(resting) > 1
    async with await open_image(image, writable=True) as access:
        await access.read(bytearray(MIB), 0)
        await CHANGES[change](access)
        await access.flush()
        assert flags(image) == {"recording": ["auto", "in-use"], "resting": []}
    assert flags(image) == {"recording": ["auto", "in-use"], "resting": []}
    assert await stored(image, "resting") == resting
    qemu.check(image)
    # A bitmap that is still right can be used as the source of another one.
    qemu.qemu_img("bitmap", "--add", "--merge", "resting", image, "copy")
    assert (await stored(image, "copy"))[1:] == resting[1:]


@pytest.mark.parametrize("change", CHANGES)
async def test_it_is_said_durably_before_anything_is_changed(image: Path, change: str) -> None:
    storage = RecordingStorage(await FileStorage.open(image, StorageOpenOptions(writable=True)))
    extension = (await read_header(storage)).bitmaps
    assert extension is not None
    directory = range(
        extension.directory_offset, extension.directory_offset + extension.directory_size
    )
    async with FormatAccess(await Qcow2.open(storage, writable=True)) as access:
        await CHANGES[change](access)
    records = storage.log.records
    assert records[0].kind == "write"
    assert records[0].offset in directory
    assert len(records[0].data) == 4
    assert records[1].kind == "sync"
    assert all(record.offset not in directory for record in records[1:] if record.kind == "write")


async def test_what_is_in_use_already_needs_no_second_mark(image: Path) -> None:
    for kinds in (["write", "sync"], ["write"]):
        storage = RecordingStorage(await FileStorage.open(image, StorageOpenOptions(writable=True)))
        async with FormatAccess(await Qcow2.open(storage, writable=True)) as access:
            await access.write(b"x" * 512, 0)
            assert [record.kind for record in storage.log.records][: len(kinds)] == kinds
            assert storage.log.records[0].length == (4 if len(kinds) == 2 else 512)


class CancelledSyncs(RecordingStorage):
    """Somebody cancels at each sync, as it begins."""

    scope: trio.CancelScope | None = None

    async def sync(self) -> None:
        if self.scope is not None:
            self.scope.cancel()
            await trio.lowlevel.checkpoint()
        await super().sync()


@pytest.mark.parametrize("mark", ["bitmap in use", "unknown autoclear bit"])
async def test_a_mark_is_durable_though_the_first_write_is_cancelled(
    image: Path, mark: str
) -> None:
    if mark == "unknown autoclear bit":
        with image.open("r+b") as file:
            file.seek(88)
            file.write((1 << 40 | 1).to_bytes(8, "big"))
    inner = await FileStorage.open(image, StorageOpenOptions(writable=True))
    storage = CancelledSyncs(inner)
    async with FormatAccess(await Qcow2.open(storage, writable=True)) as access:
        with trio.CancelScope() as storage.scope:
            await access.write(b"x" * 512, 0)
        storage.scope = None
        log = storage.log.records
        kinds = [record.kind for record in log]
        await access.write(b"y" * 512, 4096)
    marked = max(n for n, kind in enumerate(kinds) if kind == "write" and len(log[n].data) < 512)
    assert "sync" in kinds[marked:]
