"""VMDKs that qemu-img made, and ones that it cannot make: what is read, and where it is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from imagofs.access import FormatAccess
from imagofs.errors import UnsupportedError
from imagofs.format.base import INDIRECT, MIXED, NOT_CACHED, SPECIAL, ZERO
from imagofs.mapping import EofMapping, RawMapping, SpecialMapping, ZeroMapping
from tests import qemu
from tests.vmdk.build import (
    GRAIN,
    GRAIN_SECTORS,
    SECTOR,
    ZERO_GRAIN,
    FolderOpener,
    build_sparse,
    open_folder_vmdk,
    pack_descriptor,
    pattern,
    read_all,
)

SPARSE = ["monolithicSparse", "twoGbMaxExtentSparse", "streamOptimized"]
FLAT = ["monolithicFlat", "twoGbMaxExtentFlat"]
SIZES = [512, 65536, 1 << 20, 5 * (1 << 20) + 17 * 512, 33 << 20]


def make(folder: Path, subformat: str, size: int, seed: int, **options: Any) -> Path:
    """An image with random writes, zeroes among them."""
    rng = random.Random(f"{subformat} {size} {seed}")
    writes = []
    for _ in range(rng.randrange(1, 12)):
        start = rng.randrange(size // 512) * 512
        length = min(rng.randrange(1, 400) * 512, size - start)
        writes.append(f"write -P {rng.randrange(256)} {start} {length}")
    if subformat != "streamOptimized":
        return qemu.create(
            folder / "disk.vmdk", size, fmt="vmdk", subformat=subformat, writes=writes, **options
        )
    plain = qemu.create(folder / "plain.raw", size, fmt="raw", writes=writes)
    disk = folder / "disk.vmdk"
    qemu.qemu_img(
        *("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", plain, disk)
    )
    return disk


async def host_map(image: FormatAccess) -> list[tuple[int, int, str, int | None]]:
    """(start, length, kind, host offset) of the whole disk, as `qemu-img map` tells them apart."""
    result: list[tuple[int, int, str, int | None]] = []
    async for start, mapping in image.map():
        match mapping:
            case RawMapping():
                result.append((start, mapping.length, "data", mapping.offset))
            case SpecialMapping():
                result.append((start, mapping.length, "data", None))
            case _:
                assert isinstance(mapping, ZeroMapping)
                result.append((start, mapping.length, "zero", None))
    return result


def qemu_map(path: Path) -> list[tuple[int, int, str, int | None]]:
    entries = json.loads(qemu.qemu_img("map", "-U", "--output=json", path))
    return [
        (e["start"], e["length"], "data" if e["data"] else "zero", e.get("offset")) for e in entries
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("subformat", SPARSE + FLAT)
async def test_qemus_images_read_as_qemu_reads_them(subformat, size, tmp_path):
    path = make(tmp_path, subformat, size, 1)
    expected = qemu.contents(path, "vmdk")
    async with FormatAccess(await open_folder_vmdk(path)) as image:
        assert image.size() == size == len(expected)
        assert await read_all(image) == expected
        assert await read_all(image, 4096 + 512) == expected
        rng = random.Random(size)
        for _ in range(50):
            start = rng.randrange(size)
            length = rng.randrange(1, min(300_000, size - start) + 1)
            data = bytearray(length)
            await image.read(data, start)
            assert data == expected[start : start + length]
            again = bytearray(length)
            if image.read_nowait(memoryview(again), start):
                assert again == data


@pytest.mark.parametrize("subformat", SPARSE)
@pytest.mark.parametrize("seed", range(3))
async def test_mappings_are_those_of_qemu_img_map(subformat, seed, tmp_path):
    path = make(tmp_path, subformat, 40 << 20, seed)
    async with FormatAccess(await open_folder_vmdk(path)) as image:
        assert await host_map(image) == qemu_map(path)


async def test_zeroed_grains(tmp_path):
    path = qemu.create(
        *(tmp_path / "disk.vmdk", 4 << 20),
        fmt="vmdk",
        zeroed_grain=True,
        writes=["write -P 1 0 1M", "write -z 128k 256k", "write -z 2M 64k", "write -P 3 3M 1k"],
    )
    async with FormatAccess(await open_folder_vmdk(path)) as image:
        assert await read_all(image) == qemu.contents(path, "vmdk")
        assert await host_map(image) == qemu_map(path)
        assert await image.get_mapping(128 << 10, 1 << 20) == ZeroMapping(256 << 10, explicit=True)


@pytest.mark.parametrize("subformat", FLAT)
async def test_flat_mappings(subformat, tmp_path):
    path = make(tmp_path, subformat, 1 << 20, 1)
    async with FormatAccess(await open_folder_vmdk(path)) as image:
        (mapping,) = [mapping async for _, mapping in image.map()]
        assert isinstance(mapping, RawMapping)
        assert (mapping.length, mapping.offset, mapping.writable) == (1 << 20, 0, False)
        assert mapping.storage.filename == str(
            next(f for f in tmp_path.iterdir() if "-f" in f.name)
        )
        for start, length, kind, offset in qemu_map(path):
            # qemu asks the file for holes; where it sees data, it sees them at the same place.
            assert kind == "zero" or (offset == start and start + length <= mapping.length)


@pytest.mark.parametrize("subformat", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
async def test_extents_of_two_gibibytes(subformat, tmp_path):
    places = [0, (2 << 30) - 65536, 2 << 30, (4 << 30) - 512, 5 << 30]
    path = qemu.create(
        *(tmp_path / "disk.vmdk", (5 << 30) + 65536),
        fmt="vmdk",
        subformat=subformat,
        writes=[f"write -P {n} {place} 64k" for n, place in enumerate(places, 1)],
    )
    async with FormatAccess(await open_folder_vmdk(path)) as image:
        assert image.size() == (5 << 30) + 65536
        assert len(image.driver.storages) == 4
        for number, place in reversed(list(enumerate(places, 1))):
            data = bytearray(65536)
            await image.read(data, place)
            assert data == bytes([number]) * 65536
        # From one extent into the next, in one request.
        data = bytearray(1 << 20)
        await image.read(data, (2 << 30) - (1 << 19))
        middle = (1 << 19) - 65536
        assert data == bytes(middle) + b"\2" * 65536 + b"\3" * 65536 + bytes(middle)
        if subformat == "twoGbMaxExtentSparse":
            assert await host_map(image) == qemu_map(path)


@pytest.mark.parametrize("subformat", SPARSE + FLAT)
async def test_details_are_those_of_qemu_img_info(subformat, tmp_path):
    path = make(tmp_path, subformat, 1 << 20, 1)
    info = qemu.info(path)
    image = await open_folder_vmdk(path)
    details = image.details()
    for extent in details["extents"]:
        assert json.dumps(extent)
    assert details == info["format-specific"]["data"]
    assert image.cluster_size == info.get("cluster-size")
    assert image.size() == info["virtual-size"]
    assert image.filename == str(path)
    await image.close()


async def test_a_lone_extent_of_a_split_disk(tmp_path):
    qemu.create(
        tmp_path / "disk.vmdk",
        1 << 20,
        fmt="vmdk",
        subformat="twoGbMaxExtentSparse",
        writes=["write -P 9 64k 64k"],
    )
    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk-s001.vmdk")) as image:
        assert await read_all(image) == bytes(65536) + b"\t" * 65536 + bytes((1 << 20) - 131072)
        assert image.driver.details()["create-type"] == "monolithicSparse"
        assert "cid" not in image.driver.details()


# --- flat and zero extents that qemu does not know ---------------------------------------------


async def test_every_access_mode_and_offsets_in_sectors(tmp_path):
    data = pattern(1, 100 * SECTOR)
    (tmp_path / "a.bin").write_bytes(data)
    (tmp_path / "disk.vmdk").write_bytes(
        pack_descriptor(
            'RW 10 FLAT "a.bin" 3',
            "RW 7 ZERO",
            'RDONLY 5 FLAT "a.bin" 50',
            "RDONLY 1 ZERO",
            'RW 20 VMFS "a.bin"',
        )
    )
    expected = (
        data[3 * SECTOR : 13 * SECTOR]
        + bytes(7 * SECTOR)
        + data[50 * SECTOR : 55 * SECTOR]
        + bytes(SECTOR)
        + data[: 20 * SECTOR]
    )
    opener = FolderOpener(tmp_path)
    driver = await open_folder_vmdk(tmp_path / "disk.vmdk", opener=opener)
    async with FormatAccess(driver) as image:
        assert image.size() == len(expected) == 43 * SECTOR
        assert await read_all(image) == expected
        # Every boundary, hit exactly and crossed.
        for edge in (0, 10, 17, 22, 23, 43):
            for start in range(max(edge - 2, 0), min(edge + 2, 43)):
                for length in (1, 2, 3):
                    part = bytearray(min(length, 43 - start) * SECTOR)
                    await image.read(part, start * SECTOR)
                    assert part == expected[start * SECTOR :][: len(part)]
        assert [
            (start // SECTOR, type(mapping), mapping.length // SECTOR)
            async for start, mapping in image.map()
        ] == [
            (0, RawMapping, 10),
            (10, ZeroMapping, 7),
            (17, RawMapping, 5),
            (22, ZeroMapping, 1),
            (23, RawMapping, 20),
        ]
        assert await image.get_mapping(43 * SECTOR, 1) == EofMapping()
    # A file that is named twice is opened once.
    assert opener.asked == [("a.bin", False)]


async def test_noaccess_extents_are_never_opened_and_never_read(tmp_path):
    (tmp_path / "disk.vmdk").write_bytes(
        pack_descriptor("RW 8 ZERO", 'NOACCESS 8 FLAT "missing" 0', "RW 8 ZERO")
    )
    opener = FolderOpener(tmp_path)
    driver = await open_folder_vmdk(tmp_path / "disk.vmdk", opener=opener)
    async with FormatAccess(driver) as image:
        assert opener.asked == []
        assert image.size() == 24 * SECTOR
        kinds = [type(mapping) async for _, mapping in image.map()]
        assert kinds == [ZeroMapping, SpecialMapping, ZeroMapping]
        data = bytearray(b"x" * SECTOR)
        await image.read(data, 0)
        assert data == bytes(SECTOR)
        for start in (7, 8, 15):
            assert not image.read_nowait(memoryview(bytearray(2 * SECTOR)), start * SECTOR)
            with pytest.raises(UnsupportedError, match="NOACCESS"):
                await image.read(bytearray(2 * SECTOR), start * SECTOR)
        await image.read(data, 16 * SECTOR)


async def test_many_extents_are_found_by_their_edges(tmp_path):
    # The search among extents is right at every edge, whatever their number is.
    rng = random.Random(5)
    data = pattern(2, 4000 * SECTOR)
    (tmp_path / "a").write_bytes(data)
    lines, expected = [], b""
    for _ in range(37):
        length, offset = rng.randrange(1, 60), rng.randrange(3900)
        lines.append(f'RW {length} FLAT "a" {offset}')
        expected += data[offset * SECTOR : (offset + length) * SECTOR]
    (tmp_path / "disk.vmdk").write_bytes(pack_descriptor(*lines))
    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk.vmdk")) as image:
        assert await read_all(image, SECTOR) == expected
        assert await read_all(image, 7 * SECTOR) == expected
        assert await read_all(image) == expected


async def test_a_disk_without_extents(tmp_path):
    (tmp_path / "disk.vmdk").write_bytes(pack_descriptor())
    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk.vmdk")) as image:
        assert image.size() == 0
        assert await read_all(image) == b""
        assert await image.get_mapping(0, 1) == EofMapping()


async def test_an_empty_sparse_image(tmp_path):
    path = qemu.create(tmp_path / "disk.vmdk", 0, fmt="vmdk")
    async with FormatAccess(await open_folder_vmdk(path)) as image:
        assert image.size() == 0


async def test_a_header_that_only_wraps_a_descriptor(tmp_path):
    data = pattern(1, 8 * SECTOR)
    (tmp_path / "flat").write_bytes(data)
    text = pack_descriptor('RW 8 FLAT "flat" 0', create_type="monolithicFlat")
    (tmp_path / "disk.vmdk").write_bytes(build_sparse({}, 0, descriptor=text))
    expected = qemu.contents(tmp_path / "disk.vmdk", "vmdk")
    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk.vmdk")) as image:
        assert await read_all(image) == expected == data


# --- sparse extents that qemu does not make ----------------------------------------------------

LAYOUTS = [
    {"compressed": False},
    {"compressed": True},
    {"compressed": True, "footer": True},
    {"compressed": True, "markers": False},
]


def sparse_disk(capacity_sectors: int, seed: int) -> tuple[dict[int, bytes], bytes]:
    """Grains, and what the disk shows."""
    rng = random.Random(seed)
    grains = {}
    expected = b""
    for number in range(-(-capacity_sectors // GRAIN_SECTORS)):
        length = min(GRAIN, capacity_sectors * SECTOR - number * GRAIN)
        part = bytes(length)
        match rng.randrange(3):
            case 0:
                part = grains[number] = pattern(number + 1, length)
            case 1:
                grains[number] = ZERO_GRAIN
        expected += part
    return grains, expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("capacity_sectors", [1, 16, 17, 128, 999])
async def test_sparse_layouts(layout, capacity_sectors, tmp_path):
    grains, expected = sparse_disk(capacity_sectors, 7)
    text = pack_descriptor(
        f'RW {capacity_sectors} SPARSE "disk.vmdk"', create_type="streamOptimized"
    )
    path = tmp_path / "disk.vmdk"
    # Some space behind the last grain: without markers, qemu reads a fixed length there.
    room = b"" if layout.get("footer") else bytes(2 * GRAIN)
    path.write_bytes(build_sparse(grains, capacity_sectors, descriptor=text, **layout) + room)
    async with FormatAccess(await open_folder_vmdk(path)) as image:
        assert await read_all(image) == expected
        assert await read_all(image, 3 * SECTOR) == expected
        assert await read_all(image, 5 * GRAIN - 100) == expected
        if layout.get("markers", True) or capacity_sectors % GRAIN_SECTORS == 0:
            assert qemu.contents(path, "vmdk") == expected
        assert await host_map(image) == qemu_map(path)


async def test_grains_of_sparse_extents_that_begin_anywhere(tmp_path):
    # Extents of 33 sectors: no grain begins at a multiple of its size, and markers may count the
    # disk's sectors or the extent's.
    expected = b""
    lines = []
    for number in range(4):
        grains, part = sparse_disk(33, number)
        first = 33 * number if number % 2 else 0
        data = build_sparse(grains, 33, compressed=number > 1, first_sector=first)
        (tmp_path / f"s{number}").write_bytes(data)
        lines.append(f'RDONLY 33 SPARSE "s{number}"')
        expected += part
    (tmp_path / "disk.vmdk").write_bytes(pack_descriptor(*lines))
    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk.vmdk")) as image:
        for step in (SECTOR, 3 * SECTOR, GRAIN, 1 << 20):
            assert await read_all(image, step) == expected


async def test_the_capacity_of_an_extent_may_be_rounded_up_to_grains(tmp_path):
    grains, expected = sparse_disk(48, 3)
    (tmp_path / "s1").write_bytes(build_sparse(grains, 48))
    (tmp_path / "disk.vmdk").write_bytes(pack_descriptor('RW 40 SPARSE "s1"', "RW 3 ZERO"))
    async with FormatAccess(await open_folder_vmdk(tmp_path / "disk.vmdk")) as image:
        assert await read_all(image) == expected[: 40 * SECTOR] + bytes(3 * SECTOR)


async def test_a_large_directory_is_read_in_pages(tmp_path):
    # 4 MiB per table and more tables than a page of the directory has entries.
    grains = {0: pattern(1, GRAIN), 512 * 1500 + 3: pattern(2, GRAIN)}
    path = tmp_path / "disk.vmdk"
    path.write_bytes(build_sparse(grains, 512 * 1600 * GRAIN_SECTORS, table_entries=512))
    async with FormatAccess(await open_folder_vmdk(path)) as image:
        for number, data in grains.items():
            part = bytearray(GRAIN)
            await image.read(part, number * GRAIN)
            assert part == data
        starts = [start async for start, mapping in image.map() if isinstance(mapping, RawMapping)]
        assert starts == [number * GRAIN for number in grains]
        assert len(starts) == 2


# --- entry_at ----------------------------------------------------------------------------------


async def test_entries_agree_with_mappings(tmp_path):
    grains, _ = sparse_disk(999, 11)
    for name, compressed in (("s1", False), ("s2", True)):
        (tmp_path / name).write_bytes(build_sparse(grains, 999, compressed=compressed))
    (tmp_path / "flat").write_bytes(pattern(1, 500 * SECTOR))
    (tmp_path / "disk.vmdk").write_bytes(
        pack_descriptor(
            'RW 999 SPARSE "s1"', 'RW 300 FLAT "flat" 100', 'RW 999 SPARSE "s2"', "RW 5 ZERO"
        )
    )
    driver = await open_folder_vmdk(tmp_path / "disk.vmdk")
    assert driver.entry_at(0) == NOT_CACHED
    seen = set()
    for offset in range(0, driver.size(), SECTOR):
        mapping = await driver.get_mapping(offset, driver.granularity)
        answer = driver.entry_at(offset)
        granule_end = min((offset | driver.granularity - 1) + 1, driver.size())
        if answer == MIXED:
            # Only where a unit or an extent ends within the granule.
            edges = (999, 1299, 2298)
            assert any(offset < edge * SECTOR < granule_end for edge in edges) or any(
                offset // SECTOR < start + unit < granule_end // SECTOR
                for start in (0, 1299)
                for unit in range(GRAIN_SECTORS, 999, GRAIN_SECTORS)
            )
            continue
        assert offset + mapping.length >= granule_end or answer != MIXED
        seen.add(min(answer, 0))
        match mapping:
            case RawMapping():
                assert answer == mapping.offset | driver.data_storages.index(mapping.storage)
            case SpecialMapping():
                assert answer == SPECIAL
            case ZeroMapping():
                assert answer == (ZERO if mapping.explicit else INDIRECT)
    assert seen == {0, SPECIAL, ZERO, INDIRECT}
    await driver.close()


async def test_granules_are_as_large_as_can_be(tmp_path):
    async def granularity(*lines: str) -> int:
        (tmp_path / "disk.vmdk").write_bytes(pack_descriptor(*lines))
        driver = await open_folder_vmdk(tmp_path / "disk.vmdk")
        await driver.close()
        return driver.granularity

    with open(tmp_path / "a", "wb") as file:
        file.truncate(8 << 30)
    (tmp_path / "s").write_bytes(build_sparse({}, 4096, grain_sectors=128))
    assert await granularity('RW 16777216 FLAT "a" 0') == 1 << 30
    two_gb = ['RW 4192256 FLAT "a" 0'] * 3
    assert await granularity(*two_gb) == 1 << 20
    assert await granularity('RW 63 FLAT "a" 0', 'RW 10000 FLAT "a" 63') == 64 << 10
    assert await granularity('RW 4096 SPARSE "s"', 'RW 4096 SPARSE "s"') == 64 << 10
    assert await granularity("RW 63 ZERO", 'RW 4096 SPARSE "s"') == 4 << 10
    assert await granularity() == 1 << 30
