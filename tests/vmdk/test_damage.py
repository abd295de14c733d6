"""VMDKs that are damaged, truncated or made to do harm: named cases, then any."""

from __future__ import annotations

import errno
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from imagofs.access import FormatAccess
from imagofs.errors import (
    CorruptImageError,
    FormatError,
    ImagofsError,
    StorageError,
    UnsupportedError,
    errno_of,
)
from imagofs.inflating import InflatedCache
from tests import qemu
from tests.vmdk.build import (
    GD_AT_END,
    GRAIN,
    GRAIN_SECTORS,
    SECTOR,
    ZERO_GRAIN,
    FolderOpener,
    build_sparse,
    open_folder_vmdk,
    pack_descriptor,
    pack_header,
    pattern,
    read_all,
)

CAPACITY = 8 * GRAIN_SECTORS
GRAINS = {0: pattern(1, GRAIN), 2: pattern(2, GRAIN), 3: ZERO_GRAIN, 7: pattern(3, GRAIN)}
CONTENTS = b"".join(GRAINS.get(n) or bytes(GRAIN) for n in range(8))


class Damaged:
    """A small sparse image whose structures can be found and changed."""

    def __init__(self, **how: object) -> None:
        self.data = bytearray(build_sparse(GRAINS, CAPACITY, **how))  # type: ignore[arg-type]
        header = self.data[-2 * SECTOR :] if how.get("footer") else self.data
        self.directory = struct.unpack_from("<Q", header, 56)[0] * SECTOR
        self.table = struct.unpack_from("<I", self.data, self.directory)[0] * SECTOR

    def grain(self, number: int) -> int:
        """Where a grain is."""
        sector: int = struct.unpack_from("<I", self.data, self.table + 4 * number)[0]
        return sector * SECTOR

    def set(self, layout: str, position: int, *values: int) -> None:
        """Overwrite numbers."""
        struct.pack_into(f"<{layout}", self.data, position, *values)

    async def open(self, folder: Path) -> FormatAccess:
        path = folder / "disk.vmdk"
        path.write_bytes(self.data)
        return FormatAccess(await open_folder_vmdk(path))


async def read_grain(image: FormatAccess, number: int) -> bytes:
    data = bytearray(GRAIN)
    await image.read(data, number * GRAIN)
    return bytes(data)


async def check_only_grain_2_is_lost(image: FormatAccess, message: str) -> None:
    async with image:
        for _ in range(2):
            with pytest.raises(CorruptImageError, match=message) as caught:
                await read_grain(image, 2)
            assert errno_of(caught.value) == errno.EIO
            assert caught.value.filename == image.filename
            with pytest.raises(CorruptImageError):
                await image.read(bytearray(image.size()), 0)
        for number in (0, 1, 3, 7):
            assert await read_grain(image, number) == (GRAINS.get(number) or bytes(GRAIN))


# --- tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [0, 1, 100, (1 << 32) - 1])
async def test_a_grain_behind_the_end(behind, tmp_path):
    damaged = Damaged()
    sector = min(len(damaged.data) // SECTOR + behind, (1 << 32) - 1)
    damaged.set("I", damaged.table + 8, sector)
    image = await damaged.open(tmp_path)
    await check_only_grain_2_is_lost(
        image, rf"guest offset {2 * GRAIN} .*host offset {sector * SECTOR}"
    )


async def test_a_grain_of_which_only_a_part_is_there(tmp_path):
    damaged = Damaged()
    damaged.set("I", damaged.table + 8, len(damaged.data) // SECTOR - 3)
    await check_only_grain_2_is_lost(await damaged.open(tmp_path), "behind the file")


@pytest.mark.parametrize("behind", [0, 7, (1 << 32) - 1])
async def test_a_table_behind_the_end(behind, tmp_path):
    damaged = Damaged()
    damaged.set("I", damaged.directory, min(len(damaged.data) // SECTOR + behind, (1 << 32) - 1))
    async with await damaged.open(tmp_path) as image:
        with pytest.raises(CorruptImageError, match="grain table"):
            await read_grain(image, 0)
        with pytest.raises(CorruptImageError):
            await image.get_mapping(0, 1)


async def test_tables_that_are_other_structures_show_bytes_of_the_file_only(tmp_path):
    for place in (0, 1, None):
        damaged = Damaged()
        sector = damaged.directory // SECTOR if place is None else place
        damaged.set("Q", 56, sector)
        async with await damaged.open(tmp_path) as image:
            try:
                data = await read_all(image)
            except CorruptImageError:
                continue
            assert all(
                data[at : at + SECTOR] in damaged.data or not any(data[at : at + SECTOR])
                for at in range(0, len(data), SECTOR)
            )


@pytest.mark.parametrize("sector", ["last", "behind", 1 << 40, (1 << 64) - 2])
async def test_a_directory_behind_the_end(sector, tmp_path):
    damaged = Damaged()
    end = len(damaged.data) // SECTOR
    damaged.set("Q", 56, {"last": end, "behind": end + 1}.get(sector, sector))
    with pytest.raises(FormatError, match="truncated"):
        await damaged.open(tmp_path)


async def test_more_metadata_than_file(tmp_path):
    damaged = Damaged()
    damaged.set("Q", 64, len(damaged.data) // SECTOR + 1)
    with pytest.raises(FormatError, match="truncated"):
        await damaged.open(tmp_path)


@pytest.mark.parametrize("how", [{}, {"compressed": True}, {"compressed": True, "footer": True}])
async def test_every_truncation_is_noticed(how, tmp_path):
    whole = Damaged(**how).data
    # What pads the last sector may be lost.
    end = len(whole) if "footer" in how else len(whole.rstrip(b"\0"))
    for length in range(0, end, SECTOR // 2):
        damaged = Damaged(**how)
        damaged.data = whole[:length]
        try:
            image = await damaged.open(tmp_path)
        except (FormatError, UnsupportedError):
            continue
        async with image:
            with pytest.raises(CorruptImageError):
                await read_all(image)


async def test_grains_that_are_lost_after_opening(tmp_path):
    damaged = Damaged()
    async with await damaged.open(tmp_path) as image:
        assert await read_all(image) == CONTENTS
        (tmp_path / "disk.vmdk").write_bytes(damaged.data[: damaged.grain(7)])
        with pytest.raises(ImagofsError):
            await image.invalidate_cache()
            await read_all(image)


async def test_changes_by_others_are_seen_after_invalidating(tmp_path):
    damaged = Damaged(compressed=True)
    async with await damaged.open(tmp_path) as image:
        assert await read_grain(image, 0) == GRAINS[0]
        damaged.set("I", damaged.table, 0)
        with open(tmp_path / "disk.vmdk", "r+b") as file:
            file.write(damaged.data)
        await image.invalidate_cache()
        assert await read_grain(image, 0) == bytes(GRAIN)
        assert await read_grain(image, 2) == GRAINS[2]


# --- deflated grains ---------------------------------------------------------------------------


def replace_grain(damaged: Damaged, deflated: bytes, size: int | None = None) -> None:
    """Put grain 2 at the end, with a marker that gives it `size` bytes."""
    place = len(damaged.data)
    marker = struct.pack("<QI", 2 * GRAIN_SECTORS, len(deflated) if size is None else size)
    damaged.data += marker + deflated + bytes(-(len(marker) + len(deflated)) % SECTOR)
    damaged.set("I", damaged.table + 8, place // SECTOR)


GOOD = zlib.compress(GRAINS[2])


@pytest.mark.parametrize(
    ("deflated", "size", "message"),
    [
        (GOOD, 0, "0 deflated bytes"),
        (GOOD, len(GOOD) - 1, "cut off"),
        (GOOD, 10, "cut off|damaged"),
        (GOOD, 2 * GRAIN + 1, "deflated bytes"),
        (GOOD, (1 << 32) - 1, "deflated bytes"),
        (b"garbage", None, "damaged"),
        (bytes(100), None, "damaged"),
        (zlib.compress(GRAINS[2][:-1]), None, f"inflates to {GRAIN - 1}"),
        (zlib.compress(b""), None, "inflates to 0"),
        (zlib.compress(GRAINS[2] + b"x"), None, "more than"),
        (zlib.compress(bytes(8 << 20)), None, "more than"),
        (GOOD[:-4] + b"sum!", None, "damaged"),
        (GOOD[:40] + b"\xff" * 8 + GOOD[48:], None, "damaged|inflates|cut off|more than"),
    ],
)
async def test_broken_deflated_grains(deflated, size, message, tmp_path):
    damaged = Damaged(compressed=True)
    replace_grain(damaged, deflated, size)
    place = damaged.grain(2)
    await check_only_grain_2_is_lost(
        await damaged.open(tmp_path),
        rf"guest offset {2 * GRAIN} at host offset {place}: .*({message})",
    )


async def test_a_grain_that_inflates_from_more_than_its_size(tmp_path):
    # Data that does not compress takes a little more room than it had before.
    noise = random.Random(1).randbytes(GRAIN)
    damaged = Damaged(compressed=True)
    replace_grain(damaged, zlib.compress(noise, 0))
    async with await damaged.open(tmp_path) as image:
        assert await read_grain(image, 2) == noise


@pytest.mark.parametrize("sector", [0, 2 * GRAIN_SECTORS + 1, (1 << 64) - 1])
async def test_a_marker_of_another_grain(sector, tmp_path):
    damaged = Damaged(compressed=True)
    damaged.set("Q", damaged.grain(2), sector)
    await check_only_grain_2_is_lost(await damaged.open(tmp_path), f"names sector {sector}")


async def test_two_entries_for_one_deflated_grain(tmp_path):
    damaged = Damaged(compressed=True)
    damaged.set("I", damaged.table + 8, damaged.grain(0) // SECTOR)
    await check_only_grain_2_is_lost(await damaged.open(tmp_path), "names sector 0")


async def test_a_marker_that_is_cut_off(tmp_path):
    damaged = Damaged(compressed=True)
    damaged.set("I", damaged.table + 8, len(damaged.data) // SECTOR)
    damaged.data += b"1234567"
    await check_only_grain_2_is_lost(await damaged.open(tmp_path), "cut off")


async def test_a_deflated_bomb_costs_no_memory(tmp_path):
    bomb = zlib.compress(bytes(64 << 20), 9)
    noise = {0: random.Random(2).randbytes(2 << 20)}
    data = bytearray(build_sparse(noise, 4096, grain_sectors=4096, compressed=True))
    struct.pack_into("<QI", data, 2 * SECTOR, 0, len(bomb))
    data[2 * SECTOR + 12 : 2 * SECTOR + 12 + len(bomb)] = bomb
    path = tmp_path / "disk.vmdk"
    path.write_bytes(data)
    async with FormatAccess(await open_folder_vmdk(path)) as image:
        buffer = bytearray(image.size())
        tracemalloc.start()
        try:
            with pytest.raises(CorruptImageError, match="more than"):
                await image.read(buffer, 0)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 12 << 20


async def test_the_cache_of_inflated_grains_is_bounded(tmp_path):
    count = 200
    grains = {n: pattern(n, GRAIN) for n in range(count)}
    path = tmp_path / "disk.vmdk"
    path.write_bytes(build_sparse(grains, count * GRAIN_SECTORS, compressed=True))
    tracemalloc.start()
    try:
        driver = await open_folder_vmdk(path, inflated=InflatedCache(16 * GRAIN))
        async with FormatAccess(driver) as image:
            before, _ = tracemalloc.get_traced_memory()
            for number in range(count):
                assert await read_grain(image, number) == grains[number]
            after, _ = tracemalloc.get_traced_memory()
            assert after - before < 40 * GRAIN
            view = memoryview(bytearray(GRAIN))
            assert image.read_nowait(view, (count - 1) * GRAIN)
            assert view == grains[count - 1]
            assert not image.read_nowait(view, 0)
    finally:
        tracemalloc.stop()


# --- sizes -------------------------------------------------------------------------------------


async def test_a_huge_capacity_costs_nothing(tmp_path):
    # The largest directory that is accepted, in a file that is one hole.
    path = tmp_path / "disk.vmdk"
    capacity = (1 << 25) * 512 * 128
    with open(path, "wb") as file:
        file.write(pack_header(capacity=capacity, grain=128, directory=2))
        file.truncate(1 << 30)
    tracemalloc.start()
    try:
        with trio.fail_after(2):
            async with FormatAccess(await open_folder_vmdk(path)) as image:
                assert image.size() == capacity * SECTOR
                for place in (0, image.size() // 2, image.size() - 4096):
                    data = bytearray(b"x" * 4096)
                    await image.read(data, place)
                    assert data == bytes(4096)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


async def test_flat_extents_that_are_too_short(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10 * SECTOR))
    for line in ('RW 11 FLAT "a" 0', 'RW 10 FLAT "a" 1', 'RW 1 FLAT "a" 10', 'RW 1 FLAT "a" 9999'):
        (tmp_path / "disk.vmdk").write_bytes(pack_descriptor("RW 5 ZERO", line))
        with pytest.raises(FormatError, match=r"truncated.*missing"):
            await open_folder_vmdk(tmp_path / "disk.vmdk")
    (tmp_path / "disk.vmdk").write_bytes(pack_descriptor('RW 1 FLAT "a" 9'))
    await (await open_folder_vmdk(tmp_path / "disk.vmdk")).close()


@pytest.mark.parametrize("sectors", [GRAIN_SECTORS * 7, CAPACITY + 1, CAPACITY * 2])
async def test_an_extent_of_another_size_than_the_descriptor_says(sectors, tmp_path):
    (tmp_path / "s").write_bytes(build_sparse(GRAINS, CAPACITY))
    (tmp_path / "disk.vmdk").write_bytes(pack_descriptor(f'RW {sectors} SPARSE "s"'))
    with pytest.raises(FormatError, match="in the descriptor"):
        await open_folder_vmdk(tmp_path / "disk.vmdk")


async def test_extents_of_the_wrong_kind(tmp_path):
    (tmp_path / "flat").write_bytes(bytes(CAPACITY * SECTOR))
    (tmp_path / "cowd").write_bytes(b"COWD".ljust(2048, b"\0"))
    (tmp_path / "empty").write_bytes(b"")
    for name in ("flat", "cowd", "empty"):
        (tmp_path / "disk.vmdk").write_bytes(pack_descriptor(f'RW {CAPACITY} SPARSE "{name}"'))
        with pytest.raises((FormatError, UnsupportedError)):
            await open_folder_vmdk(tmp_path / "disk.vmdk")


async def test_a_missing_extent(tmp_path):
    (tmp_path / "disk.vmdk").write_bytes(pack_descriptor('RW 1 FLAT "nowhere" 0'))
    with pytest.raises(StorageError, match="nowhere"):
        await open_folder_vmdk(tmp_path / "disk.vmdk")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"KDM",
        b"KDMV",
        b"not an image at all\n" * 100,
        bytes(4096),
        b"QFI\xfb" + bytes(508),
        pack_header(directory=GD_AT_END),
        pack_header(descriptor=1, descriptor_size=4),
        pack_descriptor() + b"#" * (1 << 20),
    ],
    ids=range(10),
)
async def test_what_is_no_vmdk(data, tmp_path):
    (tmp_path / "disk.vmdk").write_bytes(data)
    with pytest.raises(FormatError) as caught:
        await open_folder_vmdk(tmp_path / "disk.vmdk")
    assert str(caught.value).startswith(str(tmp_path / "disk.vmdk"))


async def test_an_embedded_descriptor_of_several_extents(tmp_path):
    text = pack_descriptor(f'RW {CAPACITY} SPARSE "disk.vmdk"', "RW 1 ZERO")
    damaged = Damaged(descriptor=text)
    with pytest.raises(UnsupportedError, match="2 extents"):
        await damaged.open(tmp_path)


async def test_an_empty_embedded_descriptor(tmp_path):
    damaged = Damaged(descriptor=bytes(4 * SECTOR))
    async with await damaged.open(tmp_path) as image:
        assert await read_all(image) == CONTENTS


# --- any damage ---------------------------------------------------------------------------------

_NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 63, 64, 100, 127, 128, 129, 511, 512, 513, 4096]
    + [(1 << bits) + d for bits in (16, 25, 31, 32, 54, 63, 64) for d in (-1, 0, 1)]
)
_LAYOUTS = st.sampled_from(
    [{}, {"compressed": True}, {"compressed": True, "footer": True}]
    + [{"compressed": True, "markers": False}, {"descriptor": pack_descriptor("RW 128 ZERO")}]
)


@st.composite
def _broken_images(draw):
    """A small image with some numbers and bytes changed."""
    damaged = Damaged(**draw(_LAYOUTS))
    places = (
        *((2, at) for at in (77,)),
        *((4, at) for at in (4, 8, 44)),
        *((8, at) for at in (12, 20, 28, 36, 48, 56, 64)),
        *((4, damaged.directory), (4, damaged.directory + 4)),
        *((4, damaged.table + 4 * number) for number in range(8)),
        *((8, damaged.grain(number)) for number in (0, 2, 7)),
        *((4, damaged.grain(number) + 8) for number in (0, 2, 7)),
    )
    for size, place in draw(st.lists(st.sampled_from(places), max_size=4)):
        value = draw(_NUMBERS) & (1 << 8 * size) - 1
        damaged.data[place : place + size] = value.to_bytes(size, "little")
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(damaged.data) - 1))
        damaged.data[place] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del damaged.data[draw(st.integers(0, len(damaged.data))) :]
    return bytes(damaged.data)


async def _try_all(path: Path) -> bytes | None:
    """Open, map and read; the contents, or None where something was refused."""
    opener = FolderOpener(path.parent)
    with trio.fail_after(5):
        try:
            driver = await open_folder_vmdk(path, opener=opener)
        except ImagofsError as exc:
            assert "\n" not in str(exc)
            return None
        async with FormatAccess(driver) as image:
            size = image.size()
            try:
                position = 0
                for _ in range(200):
                    if position < size:
                        mapping = await image.get_mapping(position, size - position)
                        assert 0 < mapping.length <= size - position
                        position += mapping.length
                if size <= 1 << 22:
                    data = await read_all(image)
                    assert await read_all(image, 5 * SECTOR) == data
                    return data
                for place in (0, size // 3 & -SECTOR, size - SECTOR):
                    await image.read(bytearray(SECTOR), place)
            except ImagofsError as exc:
                assert "\n" not in str(exc)
    return None


@settings(max_examples=200)
@given(data=_broken_images())
def test_any_damage_is_an_error_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.vmdk"
    path.write_bytes(data)
    trio.run(_try_all, path)


@settings(max_examples=30)
@given(data=_broken_images())
def test_what_both_read_is_the_same(tmp_path_factory, data):
    # qemu refuses less, and more; what both of us read must not differ.
    path = tmp_path_factory.getbasetemp() / "fuzzed.vmdk"
    path.write_bytes(data)
    contents = trio.run(_try_all, path)
    if contents is not None:
        try:
            theirs = qemu.contents(path, "vmdk")
        except AssertionError:
            return
        assert contents == theirs
