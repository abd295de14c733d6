"""Host clusters: which are taken, when they come back, and what keeps that from going wrong."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from imagofs.access import FormatAccess
from imagofs.errors import CorruptImageError
from imagofs.format.qcow2.driver import Qcow2
from imagofs.gate import PermissiveImplicitOpenGate
from imagofs.opening import open_image
from imagofs.storage import FileStorage, StorageOpenOptions
from tests import qemu
from tests.support.qcow2_oracle import Layout, check, data_clusters, read_disk
from tests.support.storages import Log, RecordingStorage


async def writable(path: Path, metadata_bytes: int | None = None) -> FormatAccess:
    return await open_image(
        path, writable=True, gate=PermissiveImplicitOpenGate(), metadata_bytes=metadata_bytes
    )


def assert_sound(path: Path, contents: bytes | bytearray) -> None:
    image = path.read_bytes()
    verdict = check(image)
    assert not verdict.errors
    assert not verdict.leaked
    qemu.check(path)
    assert read_disk(image) == contents


async def test_freed_neighbours_that_two_blocks_count_stay_two(new_image) -> None:
    size = 256 << 10
    path = new_image(size, cluster_size=512, refcount_bits=64, writes=[f"write -q -P 1 0 {size}"])
    contents = bytearray(b"\1") * size
    guest_of = {host >> 9: guest for guest, host in data_clusters(path.read_bytes()).items()}
    # A block counts 64 clusters.
    last = next(host for host in guest_of if host % 64 == 63 and host + 1 in guest_of)
    image = await writable(path)
    for host in (last, last + 1):
        await image.discard_to_zero(guest_of[host], 512)
    await image.flush()
    for host in (last, last + 1):
        await image.write(b"\2" * 512, guest_of[host])
        contents[guest_of[host] : guest_of[host] + 512] = b"\2" * 512
    for host in (last, last + 1):
        await image.discard_to_zero(guest_of[host], 512)
    await image.flush()
    # Both at once: one run of two clusters would be counted by one block.
    for start in (guest_of[last], guest_of[last + 1]):
        contents[start : start + 512] = bytes(512)
    both = min(guest_of[last], guest_of[last + 1])
    if abs(guest_of[last] - guest_of[last + 1]) == 512:
        await image.write(b"\3" * 1024, both)
        contents[both : both + 1024] = b"\3" * 1024
    await image.close()
    assert_sound(path, contents)


async def test_a_freed_cluster_whose_block_was_forgotten(new_image) -> None:
    size = 32 << 20
    path = new_image(size, cluster_size=512, writes=["write -q -P 1 0 200k"])
    contents = bytearray(size)
    contents[: 200 << 10] = b"\1" * (200 << 10)
    image = await writable(path, metadata_bytes=1)
    # Clusters are taken from behind this one on, unless one before it is known to be free.
    await image.write(b"\4" * 512, 30 << 20)
    contents[30 << 20 : (30 << 20) + 512] = b"\4" * 512
    await image.discard_to_zero(4096, 512)
    await image.flush()
    buffer = bytearray(1 << 20)
    for start in range(0, size, len(buffer)):  # fills the cache with other tables
        await image.read(buffer, start)
    await image.write(b"\2" * 1024, 8192 - 512)
    await image.write(b"\3" * 512, 20 << 20)
    contents[4096 : 4096 + 512] = bytes(512)
    contents[8192 - 512 : 8192 + 512] = b"\2" * 1024
    contents[20 << 20 : (20 << 20) + 512] = b"\3" * 512
    await image.close()
    assert_sound(path, contents)


def put(path: Path, offset: int, *words: int) -> None:
    """Write big-endian 64-bit words into a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(f">{len(words)}Q", *words))


def first_l2_table(path: Path) -> int:
    layout = Layout(path.read_bytes())
    return layout.words(layout.l1_offset, 1)[0] & 0x00FFFFFFFFFFFE00


@pytest.mark.parametrize("change", ["write", "discard", "zero"])
async def test_no_reference_is_taken_from_metadata(new_image, change: str) -> None:
    """A compressed descriptor that lies over the L1 table must not be its last reference."""
    path = new_image(1 << 20, cluster_size=4096, writes=["write -q -P 1 0 64k"])
    before = Layout(path.read_bytes())
    put(path, first_l2_table(path) + 8, 1 << 62 | before.l1_offset)
    image = await writable(path)
    with pytest.raises(CorruptImageError, match="cannot be right"):
        if change == "write":
            await image.write(b"\2" * 4096, 4096)
        elif change == "discard":
            await image.discard_to_any(4096, 4096)
        else:
            await image.write_zeroes(4096, 4096)
    await image.write(b"\2" * 4096, 512 << 10)
    await image.close()
    after = Layout(path.read_bytes())
    assert after.refcounts()[before.l1_offset >> 12] == 1
    assert after.words(after.l1_offset, 1) == before.words(before.l1_offset, 1)


async def test_no_block_is_made_over_metadata_that_nobody_counts(new_image) -> None:
    """An L2 table in a range that has no refcount block yet, in the cluster that the block of the
    range would take."""
    size = 1 << 20
    path = new_image(size, cluster_size=512, refcount_bits=64, writes=["write -q -P 1 0 16k"])
    image_bytes = path.read_bytes()
    layout = Layout(image_bytes)
    blocks = layout.words(layout.table_offset, 64)
    free = next(index for index, offset in enumerate(blocks) if not offset)
    table = first_l2_table(path)
    place = free * 64 * 512
    with path.open("r+b") as file:
        file.seek(place)
        file.write(image_bytes[table : table + 512])
    put(path, layout.l1_offset, 1 << 63 | place)
    copy = path.read_bytes()[place : place + 512]
    image = await writable(path)
    with pytest.raises(CorruptImageError, match="refcount of 0"):
        for start in range(512 << 10, size, 4096):
            await image.write(b"\2" * 4096, start)
    await image.close()
    assert path.read_bytes()[place : place + 512] == copy


async def test_clusters_of_an_old_l1_table_are_not_taken_for_unused_ones(new_image) -> None:
    """What was metadata a moment ago must not show up around a write that fills its cluster in
    part."""
    size = 4 << 20  # an L2 table maps 32 KiB, a cluster has 64 L1 entries: 2 MiB
    path = new_image(size, cluster_size=512)
    image = await writable(path)
    written = range(0, size, 32 << 10)
    for start in written:  # so that there is something in the L1 table
        await image.write(b"\1" * 512, start)
    for size in (9 << 20, 20 << 20):
        await image.resize(size)
        await image.flush()
    contents = bytearray(size)
    for start in written:
        contents[start : start + 512] = b"\1" * 512
        await image.write(b"\2", start + 612)
        contents[start + 612] = 2
    found = bytearray(size)
    await image.read(found, 0)
    assert found == contents
    await image.close()
    assert_sound(path, contents)


@pytest.mark.parametrize("raw", [False, True])
async def test_data_file_entries_that_point_elsewhere_are_refused(new_image, raw: bool) -> None:
    folder = new_image(1 << 20, name="aside.qcow2").parent
    path = new_image(
        1 << 20,
        data_file=folder / "data",
        data_file_raw=raw,
        writes=["write -q -P 1 0 128k"],
    )
    put(path, first_l2_table(path) + 8, 1 << 63)  # the second cluster is said to be at 0
    data = (folder / "data").read_bytes()
    image = await writable(path)
    with pytest.raises(CorruptImageError, match="cannot be right"):
        await image.read(bytearray(512), 64 << 10)
    with pytest.raises(CorruptImageError, match="cannot be right"):
        await image.write(b"\2" * 512, 64 << 10)
    await image.close()
    assert (folder / "data").read_bytes() == data


async def test_a_raw_data_file_keeps_the_disks_length(new_image) -> None:
    size = (1 << 20) - 512
    folder = new_image(1 << 20, name="aside.qcow2").parent
    path = new_image(size, data_file=folder / "data", data_file_raw=True)
    with (folder / "data").open("r+b") as file:
        file.truncate(size)
    image = await writable(path)
    await image.write(b"\1" * 65536, size - 65536)
    await image.write_zeroes(size - 3000, 3000, allocate=True)
    await image.write_zeroes(size - 70000, 70000, allocate=True)
    await image.write_zeroes(size - 70000, 70000)
    await image.discard_to_zero(size - 140000, 140000)
    await image.discard_to_backing(size - 140000, 140000)
    await image.close()
    assert (folder / "data").stat().st_size == size
    assert not any((folder / "data").read_bytes())


@pytest.mark.parametrize("table", [False, True], ids=["no table", "zero entry"])
@pytest.mark.parametrize("change", ["write_zeroes", "discard_to_zero"])
async def test_zeroes_reach_what_an_interrupted_write_left_in_a_raw_data_file(
    new_image, change: str, table: bool
) -> None:
    """The guest sees zeroes before and after; who reads the data file by itself must, too."""
    size = 4 << 20
    folder = new_image(size, name="aside.qcow2").parent
    path = new_image(size, data_file=folder / "data", data_file_raw=True)
    image = await writable(path)
    await image.write_zeroes(0, 1 << 20)
    await image.close()
    if not table:
        put(path, Layout(path.read_bytes()).l1_offset, 0)
    with (folder / "data").open("r+b") as file:
        file.write(b"\1" * (1 << 20))
    image = await writable(path)
    # Parts of clusters at both ends.
    await getattr(image, change)(512, (1 << 20) - 4096)
    await image.close()
    ends = b"\1" * 512 + bytes((1 << 20) - 4096) + b"\1" * (4096 - 512)
    assert (folder / "data").read_bytes() == ends.ljust(size, b"\0")


@pytest.mark.parametrize("extended", [False, True], ids=["", "subclusters"])
async def test_what_is_missing_is_missing_before_anything_is_allocated(
    new_image, extended: bool
) -> None:
    """A new refcount block displaces the L2 slice from a cache that has no room."""
    path = new_image("64M", refcount_bits=64, extended_l2=extended, writes=["write -q -P 1 0 64k"])
    raw = path.read_bytes()
    [block] = struct.unpack_from(">Q", raw, Layout(raw).table_offset)
    counts = struct.unpack_from(">8192Q", raw, block)
    # All that the first block counts is taken, but for the last cluster.
    put(path, block, *(count or 1 for count in counts[:-1]), 0)
    leaked = len(check(path.read_bytes()).leaked)
    image = await writable(path, metadata_bytes=1)
    await image.read(bytearray(512), 1 << 20)
    await image.write_zeroes(1 << 20, 4 << 16, allocate=True)
    await image.close()
    assert len(check(path.read_bytes()).leaked) == leaked


async def test_a_mapping_to_overwrite_takes_away_only_what_it_covers(new_image) -> None:
    """The second cluster gets a host cluster that does not follow the first one's."""
    size = 1 << 20
    base = new_image(size, writes=[f"write -q -P 1 0 {size}"])
    path = new_image(size, cluster_size=4096, backing=base, writes=["write -q -P 2 0 64k"])
    contents = bytearray(b"\2" * 65536).ljust(size, b"\1")
    image = await writable(path)
    await image.write(b"\3" * 4096, 512 << 10)
    contents[512 << 10 : (512 << 10) + 4096] = b"\3" * 4096
    for start in range(0, 65536, 8192):
        await image.discard_to_zero(start, 4096)
        contents[start : start + 4096] = bytes(4096)
    await image.flush()
    position, end = (128 << 10) + 512, (160 << 10) - 512
    while position < end:
        mapping = await image.ensure_data_mapping(position, end - position, overwrite=True)
        await mapping.storage.writev([memoryview(b"\4" * mapping.length)], mapping.offset)
        contents[position : position + mapping.length] = b"\4" * mapping.length
        found = bytearray(size)
        await image.read(found, 0)
        assert found == contents
        position += mapping.length
    await image.close()
    qemu.check(path)
    assert qemu.contents(path) == contents


async def test_clusters_of_a_block_that_a_shrink_took_away(new_image) -> None:
    """They were seen freed one by one, and are in a range without a block now."""
    size = 1 << 20
    path = new_image(size, cluster_size=512, writes=["write -q -P 1 0 300k"])
    image = await writable(path)
    contents = bytearray(b"\1" * (300 << 10)).ljust(size, b"\0")
    await image.write(b"\2" * 512, 500 << 10)  # all before it counts as taken
    await image.resize(40 << 10)
    await image.flush()
    size = 600 << 10
    await image.resize(size)
    contents = bytearray(contents[: 40 << 10]).ljust(size, b"\0")
    for start in range(40 << 10, 500 << 10, 7 << 10):
        await image.write(b"\3" * 5000, start)
        contents[start : start + 5000] = b"\3" * 5000
    found = bytearray(size)
    await image.read(found, 0)
    assert found == contents
    await image.close()
    assert_sound(path, contents)
    assert path.stat().st_size < 700 << 10


async def test_changed_parts_of_a_table_are_written_together_and_nothing_else_with_them(
    new_image,
) -> None:
    """With 16 KiB clusters a table has four slices, and guest data may lie right behind it."""
    cluster, reach = 16 << 10, 512 * (16 << 10)  # of a slice
    path = new_image("64M", cluster_size=cluster)
    contents = bytearray(64 << 20)
    recorder = RecordingStorage(
        await FileStorage.open(path, StorageOpenOptions(writable=True)), Log()
    )
    image = FormatAccess(await Qcow2.open(recorder, writable=True))

    async def write(guest_offset: int, byte: int) -> None:
        data = bytes([byte]) * cluster
        await image.write(data, guest_offset)
        contents[guest_offset : guest_offset + cluster] = data

    for slice_number in range(8):  # two tables, with data of the first slices between them
        await write(slice_number * reach, 1 + slice_number)
    await image.sync()
    first = first_l2_table(path)
    for slices, tables in (((0, 3), [(first, cluster)]), ((1,), [(first + 4096, 4096)])):
        recorder.log.records.clear()
        for slice_number in slices:
            await write(slice_number * reach + cluster, 9 + slice_number)
        await image.flush()
        written = [(r.offset, r.length) for r in recorder.log.records if r.kind == "write"]
        assert [place for place in written if first <= place[0] < first + cluster] == tables
    recorder.log.records.clear()
    await write(3 * reach + 2 * cluster, 20)
    await write(4 * reach + 2 * cluster, 21)  # in the next table
    await image.flush()
    lengths = [r.length for r in recorder.log.records if r.kind == "write"]
    assert lengths.count(4096) == 2
    assert max(lengths) == cluster  # the data
    await image.close()
    assert_sound(path, contents)


async def test_a_run_that_several_sectors_of_a_block_count(new_image) -> None:
    path = new_image("4M", cluster_size=4096, refcount_bits=64)
    contents = bytearray(4 << 20)
    contents[4096 : 1 << 20] = b"\1" * ((1 << 20) - 4096)  # 255 clusters, 64 to a sector
    image = await writable(path)
    await image.write(contents[4096 : 1 << 20], 4096)
    await image.close()
    assert_sound(path, contents)
