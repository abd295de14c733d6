"""Writing to flat extents: in place, through, and announced by a new content ID."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import trio

from imagofs.access import FormatAccess
from imagofs.errors import OutOfRangeError, ReadOnlyError, StorageError, UnsupportedError
from imagofs.format.base import IN_PLACE
from imagofs.mapping import RawMapping
from imagofs.storage import FileStorage
from tests import qemu
from tests.vmdk.build import (
    GRAIN,
    SECTOR,
    FolderOpener,
    build_sparse,
    open_folder_vmdk,
    pack_descriptor,
    pattern,
    read_all,
)


def flat_disk(folder: Path, *, cid: str | None = "12345678") -> bytearray:
    """A disk of three files with a hole of zeroes in it; returns its contents."""
    parts = [pattern(n, length * SECTOR) for n, length in enumerate((200, 63, 200))]
    for number, data in enumerate(parts):
        (folder / f"f{number}").write_bytes(b"before".ljust(2 * SECTOR, b"-") + data + b"after")
    (folder / "disk.vmdk").write_bytes(
        pack_descriptor(
            'RW 200 FLAT "f0" 2',
            'RW 63 FLAT "f1" 2',
            "RW 16 ZERO",
            'RW 200 VMFS "f2" 2',
            cid=cid,
            create_type="twoGbMaxExtentFlat",
        )
    )
    return bytearray(parts[0] + parts[1] + bytes(16 * SECTOR) + parts[2])


ZEROES = range(263 * SECTOR, 279 * SECTOR)


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentFlat"])
async def test_what_was_written_is_what_qemu_reads(subformat, tmp_path):
    path = qemu.create(tmp_path / "disk.vmdk", 3 << 20, fmt="vmdk", subformat=subformat)
    model = bytearray(3 << 20)
    rng = random.Random(1)
    async with FormatAccess(await open_folder_vmdk(path, writable=True)) as image:
        for number in range(200):
            start = rng.randrange(len(model))
            length = min(rng.randrange(1, 200_000), len(model) - start)
            match rng.randrange(4):
                case 0:
                    await image.write_zeroes(start, length)
                    model[start : start + length] = bytes(length)
                case 1:
                    await image.discard_to_zero(start, length)
                    model[start : start + length] = bytes(length)
                case _:
                    data = rng.randbytes(length)
                    await image.writev([data[: length // 3], data[length // 3 :]], start)
                    model[start : start + length] = data
            if number % 50 == 0:
                await image.flush()
                assert qemu.contents(path, "vmdk") == model
        assert await read_all(image) == model
    assert qemu.contents(path, "vmdk") == model
    assert qemu.info(path)["format-specific"]["data"]["create-type"] == subformat


async def test_writes_across_extents_stay_in_them(tmp_path):
    model = flat_disk(tmp_path)
    rng = random.Random(2)
    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk.vmdk", writable=True)) as image:
        for _ in range(300):
            start = rng.randrange(len(model))
            length = min(rng.randrange(1, 90 * SECTOR), len(model) - start)
            data = rng.randbytes(length)
            if range(max(start, ZEROES.start), min(start + length, ZEROES.stop)):
                with pytest.raises(ReadOnlyError, match="extent at guest offset"):
                    await image.write(data, start)
            else:
                await image.write(data, start)
                model[start : start + length] = data
        assert await read_all(image) == model
    for number in range(3):
        data = (tmp_path / f"f{number}").read_bytes()
        assert data.startswith(b"before".ljust(2 * SECTOR, b"-"))
        assert data.endswith(b"after")


async def test_zeroes_may_be_written_where_they_are(tmp_path):
    model = flat_disk(tmp_path)
    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk.vmdk", writable=True)) as image:
        await image.write_zeroes(ZEROES.start, len(ZEROES))
        assert content_id(tmp_path) == "12345678"  # nothing was changed
        start, stop = 250 * SECTOR + 7, 290 * SECTOR + 5
        await image.write_zeroes(start, stop - start)
        model[start:stop] = bytes(stop - start)
        assert await read_all(image) == model
        await image.discard_to_any(ZEROES.start - 3, len(ZEROES) + 6)
        data = bytearray(len(ZEROES))
        await image.read(data, ZEROES.start)
        assert data == bytes(len(ZEROES))
        # A place for them is what a ZERO extent has not.
        with pytest.raises(ReadOnlyError):
            await image.write_zeroes(ZEROES.start, SECTOR, allocate=True)
        await image.write_zeroes(0, 3 * SECTOR, allocate=True)


async def test_mappings_and_entries_are_writable(tmp_path):
    flat_disk(tmp_path)
    driver = await open_folder_vmdk(tmp_path / "disk.vmdk", writable=True)
    async with FormatAccess(driver) as image:
        assert driver.entry_at(SECTOR) == 3 * SECTOR | IN_PLACE
        mapping = await image.get_mapping(SECTOR, 1 << 20)
        assert isinstance(mapping, RawMapping) and mapping.writable
        direct = await image.ensure_data_mapping(199 * SECTOR, 10 * SECTOR, overwrite=True)
        assert (direct.length, direct.offset, direct.writable) == (SECTOR, 201 * SECTOR, True)
        await direct.storage.writev([memoryview(b"y" * SECTOR)], direct.offset)
        data = bytearray(SECTOR)
        await image.read(data, 199 * SECTOR)
        assert data == b"y" * SECTOR
        with pytest.raises(ReadOnlyError):
            await image.ensure_data_mapping(ZEROES.start, SECTOR)


async def test_rdonly_extents_are_opened_read_only(tmp_path):
    (tmp_path / "a").write_bytes(bytes(64 * SECTOR))
    (tmp_path / "b").write_bytes(bytes(64 * SECTOR))
    (tmp_path / "s").write_bytes(build_sparse({0: pattern(1, GRAIN)}, 16))
    (tmp_path / "disk.vmdk").write_bytes(
        pack_descriptor(
            'RW 10 FLAT "a" 0',
            'RDONLY 10 FLAT "b" 0',
            'RDONLY 10 FLAT "a" 10',
            "NOACCESS 10",
            'RDONLY 16 SPARSE "s"',
            "RDONLY 10 ZERO",
        )
    )
    opener = FolderOpener(tmp_path)
    driver = await open_folder_vmdk(tmp_path / "disk.vmdk", writable=True, opener=opener)
    async with FormatAccess(driver) as image:
        assert opener.asked == [("a", True), ("b", False), ("s", False)]
        await image.write(b"x" * 10 * SECTOR, 0)
        for start in (9, 10, 19, 20, 29, 30, 40, 55):
            with pytest.raises(ReadOnlyError):
                await image.write(b"y" * 2 * SECTOR, start * SECTOR)
            with pytest.raises(ReadOnlyError):
                await image.write_zeroes(start * SECTOR, 2 * SECTOR)
            with pytest.raises(ReadOnlyError):
                await image.discard_to_any(start * SECTOR, 2 * SECTOR)
        with pytest.raises(ReadOnlyError):
            await image.write(b"y", 56 * SECTOR)
        assert not image.write_nowait(memoryview(b"z" * SECTOR), 20 * SECTOR)
        await image.write_zeroes(56 * SECTOR, 10 * SECTOR)
    # A request that cannot be written as a whole writes nothing.
    assert (tmp_path / "a").read_bytes() == b"x" * 10 * SECTOR + bytes(54 * SECTOR)
    assert (tmp_path / "b").read_bytes() == bytes(64 * SECTOR)


async def test_read_only_images_refuse_every_change(tmp_path):
    model = flat_disk(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    driver = await open_folder_vmdk(tmp_path / "disk.vmdk")
    async with FormatAccess(driver) as image:
        assert not driver.writable and driver.entry_at(0) & IN_PLACE == 0
        for change in (
            image.write(b"x", 0),
            image.write_zeroes(0, 1),
            image.discard_to_any(0, 1),
            image.discard_to_zero(ZEROES.start, 1),
            image.discard_to_backing(0, 1),
            image.resize(1 << 20),
            image.ensure_data_mapping(0, 1),
            driver.writev([memoryview(b"x")], 0),
            driver.write_zeroes(ZEROES.start, 1),
            driver.ensure_data_mapping(0, 1, overwrite=True),
        ):
            with pytest.raises(ReadOnlyError):
                await change
        assert not image.write_nowait(memoryview(b"x"), 0)
        await image.flush()
        await image.sync()
        assert await read_all(image) == model
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


async def test_what_vmdk_cannot_do(tmp_path):
    flat_disk(tmp_path)
    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk.vmdk", writable=True)) as image:
        with pytest.raises(UnsupportedError, match="resized"):
            await image.resize(1 << 20)
        with pytest.raises(UnsupportedError, match="layer below"):
            await image.discard_to_backing(0, 512)
        with pytest.raises(OutOfRangeError):
            await image.write(b"xx", image.size() - 1)


@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized"])
async def test_sparse_disks_are_not_opened_for_writing(subformat, tmp_path):
    path = qemu.create(tmp_path / "disk.vmdk", 1 << 20, fmt="vmdk", subformat=subformat)
    with pytest.raises(UnsupportedError, match="read-only"):
        await open_folder_vmdk(path, writable=True)


async def test_split_sparse_disks_are_not_opened_for_writing(tmp_path):
    path = qemu.create(
        tmp_path / "disk.vmdk", 1 << 20, fmt="vmdk", subformat="twoGbMaxExtentSparse"
    )
    opener = FolderOpener(tmp_path)
    with pytest.raises(UnsupportedError, match="read-only"):
        await open_folder_vmdk(path, writable=True, opener=opener)
    assert opener.asked == []


async def test_tracked_changes_are_not_left_out(tmp_path):
    (tmp_path / "f").write_bytes(bytes(SECTOR))
    (tmp_path / "disk.vmdk").write_bytes(
        pack_descriptor('RW 1 FLAT "f" 0', version="3", more=['changeTrackPath="disk-ctk.vmdk"'])
    )
    with pytest.raises(UnsupportedError, match=r"disk-ctk\.vmdk"):
        await open_folder_vmdk(tmp_path / "disk.vmdk", writable=True)
    await (await open_folder_vmdk(tmp_path / "disk.vmdk")).close()


# --- the content ID ----------------------------------------------------------------------------


def content_id(folder: Path) -> str:
    match = re.search(rb"^CID=(.*)$", (folder / "disk.vmdk").read_bytes(), re.MULTILINE)
    assert match is not None
    return match[1].decode()


@pytest.mark.parametrize("cid", ["12345678", "ABCDEF01", "567e91e", "0", "fffffffe"])
async def test_the_first_write_changes_the_content_id(cid, tmp_path):
    flat_disk(tmp_path, cid=cid)
    before = (tmp_path / "disk.vmdk").read_bytes()
    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk.vmdk", writable=True)) as image:
        await read_all(image)
        await image.flush()
        assert content_id(tmp_path) == cid
        assert not image.write_nowait(memoryview(b"x" * SECTOR), 0)
        await image.write(b"x" * SECTOR, 0)
        changed = content_id(tmp_path)
        assert len(changed) == len(cid)
        assert int(changed, 16) not in (int(cid, 16), 0xFFFFFFFF)
        assert image.driver.details()["cid"] == int(changed, 16)
        # Once is enough, and then the fast path is open.
        assert image.write_nowait(memoryview(b"y" * SECTOR), SECTOR)
        await image.write(b"x" * SECTOR, 5 * SECTOR)
        assert content_id(tmp_path) == changed
    after = (tmp_path / "disk.vmdk").read_bytes()
    assert after.replace(f"CID={changed}".encode(), f"CID={cid}".encode(), 1) == before
    assert (await open_details(tmp_path / "disk.vmdk"))["cid"] == int(changed, 16)


async def open_details(path: Path) -> dict[str, object]:
    driver = await open_folder_vmdk(path)
    try:
        return driver.details()
    finally:
        await driver.close()


async def test_a_disk_without_a_content_id(tmp_path):
    model = flat_disk(tmp_path, cid=None)
    before = (tmp_path / "disk.vmdk").read_bytes()
    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk.vmdk", writable=True)) as image:
        assert image.write_nowait(memoryview(b"y" * SECTOR), 0)
        model[:SECTOR] = b"y" * SECTOR
        assert await read_all(image) == model
    assert (tmp_path / "disk.vmdk").read_bytes() == before


async def test_concurrent_first_writes_change_it_once(tmp_path, monkeypatch):
    model = flat_disk(tmp_path)
    synced = []
    driver = await open_folder_vmdk(tmp_path / "disk.vmdk", writable=True)
    descriptor = driver.storages[0]
    sync = FileStorage.sync

    async def noted(self: FileStorage) -> None:
        synced.append((self is descriptor, content_id(tmp_path)))
        await sync(self)

    monkeypatch.setattr(FileStorage, "sync", noted)
    async with FormatAccess(driver) as image:
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(image.write, bytes([number]) * SECTOR, number * SECTOR)
                model[number * SECTOR : (number + 1) * SECTOR] = bytes([number]) * SECTOR
        assert synced == [(True, content_id(tmp_path))]
        assert await read_all(image) == model


async def test_nothing_is_written_when_the_content_id_cannot_be(tmp_path, monkeypatch):
    model = flat_disk(tmp_path)
    driver = await open_folder_vmdk(tmp_path / "disk.vmdk", writable=True)

    async def failing(self: FileStorage) -> None:
        raise StorageError("cannot sync: made to fail")

    async with FormatAccess(driver) as image:
        with monkeypatch.context() as patch:
            patch.setattr(FileStorage, "sync", failing)
            for change in (
                lambda: image.write(b"x" * SECTOR, 0),
                lambda: image.write_zeroes(0, SECTOR),
                lambda: image.discard_to_any(0, SECTOR),
                lambda: image.ensure_data_mapping(0, SECTOR),
            ):
                with pytest.raises(StorageError, match="made to fail"):
                    await change()
            assert not image.write_nowait(memoryview(b"x" * SECTOR), 0)
            assert await read_all(image) == model
        await image.write(b"x" * SECTOR, 0)


async def test_a_cancelled_first_write_leaves_no_lock(tmp_path):
    flat_disk(tmp_path)
    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk.vmdk", writable=True)) as image:
        with trio.CancelScope() as scope:
            scope.cancel()
            await image.write(b"x" * SECTOR, 0)
        assert scope.cancelled_caught
        with trio.fail_after(5):
            await image.write(b"z" * SECTOR, 0)
            data = bytearray(SECTOR)
            await image.read(data, 0)
        assert data == b"z" * SECTOR


async def test_sync_reaches_every_file_that_may_be_written(tmp_path, monkeypatch):
    flat_disk(tmp_path)
    synced = []
    sync = FileStorage.sync

    async def noted(self: FileStorage) -> None:
        synced.append(Path(self.filename or "").name)
        await sync(self)

    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk.vmdk", writable=True)) as image:
        await image.write(b"x" * SECTOR, 99 * SECTOR)
        monkeypatch.setattr(FileStorage, "sync", noted)
        await image.sync()
        assert sorted(synced) == ["disk.vmdk", "f0", "f1", "f2"]
