"""Hostile images that have a name, through all that is done with an image, within the bounds.

Others have their tests where the format is tested: damage that a repair mends in
tests/qcow2/test_repair.py, broken compressed clusters in tests/qcow2/test_compressed.py, broken
VMDKs in tests/vmdk/test_damage.py, names and headers as a mount meets them in
tests/mount/test_bad_input.py.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from imagofs import ImagofsError, PermissiveImplicitOpenGate, open_image
from tests.fuzz.case import Case, Outcome, try_case
from tests.fuzz.mutate import HEADER_FIELDS, STREAMS
from tests.fuzz.seeds import seed
from tests.qcow2.damage import CASES, COMPRESSED, COPIED, OFFSET, Bases, Image
from tests.vmdk.build import pack_descriptor


def tried(case: Case, folder: Path, prepare: Callable[[Path], object] | None = None) -> Outcome:
    outcome = try_case(case, folder, prepare=prepare)
    assert outcome.finding is None, outcome.finding
    return outcome


def changed(kind: str, *changes: Callable[[Image], object], size: int = 0) -> Case:
    """A good image with changes."""
    image = Image(seed(kind)["image"])
    for change in changes:
        change(image)
    files = {**seed(kind), "image": bytes(image.data)}
    return Case(kind, files, {"image": size} if size else {})


# --- headers --------------------------------------------------------------------------------------

VALUES: dict[str, Callable[[int, int], int]] = {
    "0": lambda old, top: 0,
    "1": lambda old, top: 1,
    "one less": lambda old, top: old - 1 & top,
    "one more": lambda old, top: old + 1 & top,
    "maximum": lambda old, top: top,
    "maximum less one": lambda old, top: top - 1,
    "half": lambda old, top: top >> 1,
}
#: Fields that say nothing that could be wrong here: without a backing file its name's length, and
#: bits that may be ignored.
IGNORED = {"backing name's length", "compatible", "autoclear"}
#: Of version 3; in version 2 there are extensions in this place.
VERSION_3_FROM = 72


@pytest.mark.parametrize("kind", ["qcow2-snapshots", "qcow2-v2"])
def test_every_field_of_the_header_at_its_limits(kind: str, tmp_path: Path):
    for name, (offset, size) in HEADER_FIELDS.items():
        for what, value in VALUES.items():
            old = int.from_bytes(seed(kind)["image"][offset : offset + size], "big")
            new = value(old, (1 << size * 8) - 1)

            def change(image: Image, offset=offset, new=new, size=size) -> None:
                image.put(offset, new, size)

            outcome = tried(changed(kind, change), tmp_path)
            if new == old:
                assert outcome.writable
            elif kind == "qcow2-v2" and offset >= VERSION_3_FROM:
                continue
            elif name in IGNORED:
                assert outcome.opened, (name, what)
            elif what in ("maximum", "maximum less one", "half") or name in (
                *("encryption", "L1 offset", "refcount table", "snapshot table"),
            ):
                assert not outcome.opened, (name, what)


def test_an_l1_table_as_large_as_a_number_can_say(tmp_path: Path):
    def most(image: Image) -> None:
        image.put(36, (1 << 32) - 1, 4)

    assert not tried(changed("qcow2", most, size=1 << 40), tmp_path).opened


def test_the_largest_tables_that_are_accepted(tmp_path: Path):
    """They lie in a hole, so that the file takes no room, and are within the bounds."""

    def tables(image: Image) -> None:
        image.put(20, 16, 4)
        image.put(24, (4 << 20) * 8192 * 65536 - 512)  # the size, for clusters of 64 KiB
        image.put(36, 4 << 20, 4)
        image.put(40, 1 << 30)
        image.put(48, 1 << 31)
        image.put(56, 128, 4)

    outcome = tried(changed("qcow2", tables, size=1 << 40), tmp_path)
    assert outcome.opened and outcome.writable


# --- tables ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind == "small"])
def test_damage_that_a_repair_mends(name: str, bases: Bases, tmp_path: Path):
    """The named damage of the repair's tests: all else that is done with such an image."""
    image = Image(bases["small"].data)
    CASES[name].damage(image)
    tried(Case(name, {"image": bytes(image.data)}), tmp_path)


def l2_entry(value: Callable[[Image], int]) -> Callable[[Image], None]:
    """Another first L2 entry."""
    return lambda image: image.put(image.place(0), value(image))


def reftable(value: Callable[[Image], int], index: int = 0) -> Callable[[Image], object]:
    return lambda image: image.put(image.reftable + index * 8, value(image))


def fields(*changes: tuple[int, int, int]) -> Callable[[Image], None]:
    """Numbers at offsets, with their sizes."""

    def change(image: Image) -> None:
        for offset, value, size in changes:
            image.put(offset, value, size)

    return change


TABLES: dict[str, tuple[Callable[[Image], object], bool]] = {
    # What is done, and whether it is opened for writing.
    "refcount table over the header": (fields((48, 0, 8)), False),
    "refcount table over itself, in a loop": (reftable(lambda i: i.reftable), False),
    "refcount blocks in a loop": (
        lambda i: [reftable(lambda i: i.block(), n)(i) for n in range(512)],
        False,
    ),
    "refcount table behind the end": (fields((48, 1 << 40, 8)), False),
    "refcount block behind the end": (reftable(lambda i: 1 << 40), False),
    "refcount block at the end of all numbers": (reftable(lambda i: (1 << 64) - 4096), False),
    "refcount block in the header": (reftable(lambda i: 1 << 9, 1), False),
    "L2 table in the header": (lambda i: i.put(i.l1, COPIED | 0x1000 - 0x1000 | 512), False),
    "L2 table that is the L1 table": (lambda i: i.put(i.l1, i.l1 | COPIED), False),
    "L2 table that is the refcount table": (lambda i: i.put(i.l1, i.reftable | COPIED), False),
    "data in the header": (l2_entry(lambda i: COPIED), True),
    "data in the L1 table": (l2_entry(lambda i: i.l1 | COPIED), True),
    "data in its own L2 table": (l2_entry(lambda i: i.l2_table(0) | COPIED), True),
    "data in the refcount block": (l2_entry(lambda i: i.block() | COPIED), True),
    "shared by two guest clusters": (
        lambda i: i.put(i.place(0), i.u64(i.place(32768))),
        True,
    ),
    "data behind the end": (l2_entry(lambda i: i.end | COPIED), True),
    "data at the end of all numbers": (l2_entry(lambda i: OFFSET - 4096 & -4096 | COPIED), True),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_point_where_they_must_not(name: str, tmp_path: Path):
    change, writable = TABLES[name]
    case = changed("qcow2", change)
    outcome = tried(case, tmp_path)
    assert not outcome.clean
    assert outcome.writable == writable


def spread(image: Image) -> None:
    """As many L2 entries as there is room for, each to a place far from all others."""
    place = image.end
    image.data += bytes(place - len(image.data))
    first = image.l2_table(0)
    for number in range(32):
        image.put(image.l1 + 8 * number, first | COPIED if not number else place | COPIED)
        for index in range(image.cluster // 8 if number else 0):
            host = (number * 8192 + index + 1) << 25
            image.data += (host | COPIED).to_bytes(8, "big")
        place = image.end
    image.put(36, 32, 4)
    image.put(24, 32 * 8192 * 65536)


@pytest.mark.parametrize("bits", [4, 6])
def test_clusters_that_are_far_from_each_other(bits: int, tmp_path: Path):
    """A few hundred KiB of entries: counting their references must not take gigabytes."""

    def change(image: Image) -> None:
        spread(image)
        image.put(96, bits, 4)

    assert tried(changed("qcow2-usual", change, size=1 << 43), tmp_path).opened


def test_damage_in_a_file_that_is_large_in_name_only(tmp_path: Path):
    case = changed("qcow2-usual", l2_entry(lambda i: i.l1 | COPIED), size=1 << 41)
    assert tried(case, tmp_path).repaired


# --- compressed clusters --------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(STREAMS)))
@pytest.mark.parametrize("kind", ["qcow2", "qcow2-zstd"])
def test_compressed_clusters_that_inflate_to_nothing_or_gigabytes(
    kind: str, number: int, tmp_path: Path
):
    def bomb(image: Image) -> None:
        shift = 70 - image.u32(20)
        sectors = min(len(STREAMS[number]) // 512, (1 << image.u32(20) - 8) - 1)
        image.put(image.place(0), COMPRESSED | sectors << shift | len(image.data))
        image.data += STREAMS[number]

    outcome = tried(changed(kind, bomb), tmp_path)
    assert outcome.opened and outcome.writable


@pytest.mark.parametrize("behind", [-1, 0, 1 << 30])
def test_compressed_clusters_that_end_past_the_file(behind: int, tmp_path: Path):
    def change(image: Image) -> None:
        most = (1 << image.u32(20) - 8) - 1
        entry = COMPRESSED | most << 70 - image.u32(20) | len(image.data) + behind
        image.put(image.place(0), entry)

    assert tried(changed("qcow2", change), tmp_path).opened


# --- snapshots ------------------------------------------------------------------------------------


def many_snapshots(entry: bytes, count: int = 65536, **sizes: int) -> Case:
    """A table of `count` times the same entry, behind everything else."""

    def change(image: Image) -> None:
        place = max(image.end, 1 << 20)
        image.data += bytes(place - len(image.data)) + entry * count
        image.put(60, count, 4)
        image.put(64, place)

    return changed("qcow2-v2", change, **sizes)


def snapshot_entry(
    l1: int = 0, l1_entries: int = 0, id_length: int = 0, name_length: int = 0, extra: int = 0
) -> bytes:
    return struct.pack(">QIHHIIQII", l1, l1_entries, id_length, name_length, 0, 0, 0, 0, extra)


SNAPSHOTS: dict[str, Callable[[], Case]] = {
    "nothing in them": lambda: many_snapshots(snapshot_entry(), count=20_000),
    "names that reach behind the end": lambda: many_snapshots(
        snapshot_entry(id_length=65535, name_length=65535), count=5000
    ),
    "names in a hole, up to the bound of the table": lambda: many_snapshots(
        snapshot_entry(id_length=65535, name_length=65535), count=500, size=1 << 40
    ),
    "names of all of the table": lambda: many_snapshots(
        snapshot_entry(id_length=500, name_length=460) + b"i" * 960
    ),
    "extra data that wraps": lambda: many_snapshots(snapshot_entry(extra=(1 << 32) - 40)),
    "L1 tables of 2^32 entries": lambda: many_snapshots(
        snapshot_entry(l1=65536, l1_entries=(1 << 32) - 1), count=5000, size=1 << 40
    ),
    "each with the same large L1 table": lambda: many_snapshots(
        snapshot_entry(l1=1 << 30, l1_entries=4 << 20), size=1 << 40
    ),
    "L1 tables at the end of all numbers": lambda: many_snapshots(
        snapshot_entry(l1=(1 << 64) - 1024, l1_entries=128), count=5000
    ),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_many_snapshots(name: str, tmp_path: Path):
    assert tried(SNAPSHOTS[name](), tmp_path).opened


# --- names ----------------------------------------------------------------------------------------


def with_backing(name: bytes, form: bytes | None = b"qcow2") -> Case:
    """An image with a backing file of that name and format, and a good one called "base"."""
    image = bytearray(seed("qcow2")["image"])
    at = int.from_bytes(image[100:104], "big")
    if form is not None:
        extension = struct.pack(">II", 0xE2792ACA, len(form)) + form + bytes(-len(form) % 8)
        image[at:4096] = (bytes(extension) + image[at:4096])[: 4096 - at]
    image[2048 : 2048 + len(name)] = name
    image[8:20] = struct.pack(">QI", 2048, len(name))
    return Case("named", {"image": bytes(image), "base": seed("qcow2-small")["image"]})


@pytest.mark.parametrize(
    "name",
    [
        *(b"x" * 1023, b"x" * 1024, b"x" * 1025, b"base\0", b"\0", b"json:{}"),
        *(b'json:{"driver":"file","filename":"base"}', b"nbd://localhost/x", b"nbd:unix:/tmp/x"),
        *(b"/dev/stdin", b"/dev/zero", b"/proc/self/mem", b"../outside", b"../inside/../outside"),
        *(b"image", b"./image", b"../inside/image", b".", b"..", b"/", b"nowhere"),
        *(b"a\nb", b"fifo", b"folder", b"symlink", b"hardlink", b"escape", b"device", b"loop"),
    ],
)
def test_names_of_backing_files(name: bytes, tmp_path: Path):
    def prepare(folder: Path) -> None:
        os.mkfifo(folder / "fifo")
        (folder / "folder").mkdir()
        (folder / "symlink").symlink_to("image")
        (folder / "hardlink").hardlink_to(folder / "image")
        (folder / "escape").symlink_to("../outside")
        (folder / "device").symlink_to("/dev/zero")
        (folder / "loop").symlink_to("loop")

    assert not tried(with_backing(name), tmp_path, prepare).opened


@pytest.mark.parametrize("name", ["/dev/stdin", "/dev/zero", "/dev/tty", "fifo"])
def test_what_is_no_file_is_not_opened_by_anybody(name: str, tmp_path: Path):
    """Not even if the gate lets everything pass."""
    os.mkfifo(tmp_path / "fifo")
    image = with_backing(name.encode(), b"raw").put(tmp_path, "image")

    async def attempt() -> None:
        with trio.fail_after(2):
            await open_image(image, gate=PermissiveImplicitOpenGate())

    with pytest.raises(ImagofsError):
        trio.run(attempt)


@pytest.mark.parametrize(
    ("form", "opened"),
    [(b"qcow2", True), (b"raw", True), (None, True), (b"vmdk", False), (b"host_device", False)]
    + [(b"nbd", False), (b"", False), (b"qcow2\0", False), (b"RAW", False), (b"x" * 900, False)],
)
def test_formats_of_backing_files_that_lie(form: bytes | None, opened: bool, tmp_path: Path):
    assert tried(with_backing(b"base", form), tmp_path).opened == opened


@pytest.mark.parametrize("name", ["image", "./image", "symlink", "hardlink"])
def test_a_data_file_that_is_the_image_itself(name: str, tmp_path: Path):
    image = bytearray(seed("qcow2-data")["image"])
    at = image.index(struct.pack(">II", 0x44415441, 4)) + 4
    text = name.encode()
    image[at : at + 12] = struct.pack(">I", len(text)) + text.ljust(8, b"\0")
    case = Case("named", {**seed("qcow2-data"), "image": bytes(image)})

    def prepare(folder: Path) -> None:
        (folder / "symlink").symlink_to("image")
        (folder / "hardlink").hardlink_to(folder / "image")

    assert not tried(case, tmp_path, prepare).opened


@pytest.mark.parametrize("name", ["image", "symlink", "hardlink"])
@pytest.mark.parametrize("line", ['RW 1 FLAT "{}" 0', 'RW 300 SPARSE "{}"'])
def test_an_extent_that_is_the_descriptor_itself(line: str, name: str, tmp_path: Path):
    text = pack_descriptor(line.format(name)).ljust(1024, b"#")

    def prepare(folder: Path) -> None:
        (folder / "symlink").symlink_to("image")
        (folder / "hardlink").hardlink_to(folder / "image")

    assert not tried(Case("named", {"image": text}), tmp_path, prepare).opened
