"""Chains of qcow2 images: a range that is looked up in one walk, and granule by granule."""

from __future__ import annotations

import contextlib
import random
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from imagofs.access import FormatAccess
from imagofs.caching import MetadataCache
from imagofs.errors import CorruptImageError
from imagofs.format.base import FormatDriver
from imagofs.format.qcow2.driver import Qcow2
from imagofs.format.raw import Raw
from imagofs.resolved import CHUNK_GRANULES, NotCached, ResolvedMap
from imagofs.storage.base import Storage
from imagofs.storage.memory import MemoryStorage
from tests.support.storages import SlowStorage

COPIED, COMPRESSED, READS_AS_ZERO = 1 << 63, 1 << 62, 1
DATA_FILE, EXTENDED_L2 = 1 << 2, 1 << 4
HOST_CLUSTERS = 4096
LARGEST = 700 << 10

T = TypeVar("T")

#: Of clusters: "flags" are such as are set without a place, "wrong" is a place behind the file.
KINDS = ["data", "zero", "zero, allocated", "compressed", "flags", "wrong"]


@dataclass(frozen=True)
class Shape:
    """What a layer is like.

    Attributes:
        kind: "qcow2", "extended", "data file" or "raw".
        bits: log2 of the cluster size.
        version: Of a qcow2 image without extended entries and data file.
        size: Bytes of its disk.
        slow: Its tables are not in memory before they are waited for.
        seed: Says what its entries are.
        kinds: Of clusters, as often as they are there.
    """

    kind: str
    bits: int = 16
    version: int = 3
    size: int = LARGEST
    slow: bool = False
    seed: int = 0
    kinds: list[str] = field(default_factory=lambda: ["none"])

    async def open(self, backing: FormatAccess | None) -> FormatAccess:
        if self.kind == "raw":
            return FormatAccess(Raw(MemoryStorage(self.size)))
        options: dict[str, Any] = {"backing": backing}
        if self.kind == "data file":
            options["data_file"] = MemoryStorage(self.size)
        memory = self._image()
        storage: Storage = SlowStorage(memory) if self.slow else memory
        return FormatAccess(await Qcow2.open(storage, **options))

    def _image(self) -> MemoryStorage:
        """Header, L1 table, refcount table, L2 tables, some of which are missing; no data."""
        rnd = random.Random(self.seed)
        cluster, words = 1 << self.bits, 2 if self.kind == "extended" else 1
        per_table = cluster // 8 // words
        tables = -(-self.size // cluster // per_table)
        image = MemoryStorage(HOST_CLUSTERS << self.bits)
        incompatible = {"extended": EXTENDED_L2, "data file": DATA_FILE}.get(self.kind, 0)
        fixed = (b"QFI\xfb", self.version, 0, 0, self.bits, self.size, 0, tables, cluster)
        header = struct.pack(">4sIQIIQIIQQIIQ", *fixed, 2 * cluster, 1, 0, 0)
        if self.version == 3:
            header += struct.pack(">QQQII", incompatible, 0, 0, 4, 104)
        image.writev_nowait([memoryview(header)], 0)
        for table in range(tables):
            if rnd.random() < 0.2 and "data" in self.kinds:
                continue
            place = table + 3 << self.bits
            _put(image, cluster + table * 8, [place | COPIED])
            used = min(per_table, -(-self.size // cluster) - table * per_table) * words
            entries: list[int] = []
            while len(entries) < used:
                kind, host = rnd.choice(self.kinds), rnd.randrange(HOST_CLUSTERS)
                for _ in range(rnd.randint(1, 12)):
                    host = (host + 1) % HOST_CLUSTERS
                    guest = table * per_table + len(entries) // words
                    entries += self._entry(rnd, kind, guest if self.kind == "data file" else host)
            _put(image, place, entries[:used])
        return image

    def _entry(self, rnd: random.Random, kind: str, host: int) -> list[int]:
        place = host << self.bits | rnd.choice([COPIED, COPIED, 0])
        entry = {
            "none": 0,
            "data": place,
            "zero": READS_AS_ZERO,
            "zero, allocated": place | READS_AS_ZERO,
            "compressed": COMPRESSED | rnd.randrange(HOST_CLUSTERS << self.bits),
            "flags": rnd.choice([COPIED, 1 << 5]),
            "wrong": 1 << 50 | COPIED,
        }[kind]
        if self.kind != "extended":
            return [entry]
        if kind.startswith("zero"):
            entry &= ~READS_AS_ZERO
            return [entry, rnd.choice([(1 << 32) - 1, rnd.getrandbits(32)]) << 32]
        allocated = rnd.choice([(1 << 32) - 1, rnd.getrandbits(32)])
        zero = ~allocated & rnd.getrandbits(32) & rnd.choice([0, (1 << 32) - 1])
        return [entry, allocated | zero << 32 if kind in ("data", "wrong") else 0]


def _put(storage: MemoryStorage, offset: int, words: list[int]) -> None:
    storage.writev_nowait([memoryview(struct.pack(f">{len(words)}Q", *words))], offset)


#: Also such that are long enough for tables, slices and chunks to end within them.
SIZES = st.integers(1, LARGEST // 512) | st.sampled_from([512, 700, 1024, LARGEST // 512])


@st.composite
def shapes(draw: st.DrawFn, kinds: list[str] = KINDS) -> Shape:
    kind = draw(st.sampled_from(["qcow2", "qcow2", "extended", "data file"]))
    return Shape(
        kind,
        bits=draw(st.sampled_from([14, 15, 16] if kind == "extended" else [9, 9, 10, 12, 14, 16])),
        version=draw(st.sampled_from([3, 2])) if kind == "qcow2" and kinds is KINDS else 3,
        size=draw(SIZES) * 512,
        slow=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 32)),
        kinds=["none", *draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=8))],
    )


RAW = st.builds(Shape, st.just("raw"), size=st.integers(0, LARGEST))


async def open_chain(layers: list[Shape]) -> FormatAccess:
    """The layers' chain; the last one is the top."""
    access = None
    for shape in layers:
        access = await shape.open(access)
    assert access is not None
    return access


async def with_tables(look: Callable[..., T], *arguments: int) -> T:
    """What `look` returns once it misses no table."""
    while True:
        try:
            return look(*arguments)
        except NotCached as missing:
            with contextlib.suppress(CorruptImageError):  # of the entry; the table is there
                await missing.driver.get_mapping(missing.guest_offset, 1)


async def entries_one_by_one(layers: Sequence[FormatDriver], size: int) -> list[int]:
    """Every entry, each in a walk of its own."""
    resolved = ResolvedMap(layers, MetadataCache())
    return [
        await with_tables(resolved.entry, offset) for offset in range(0, size, resolved.granule)
    ]


async def entries_in_ranges(resolved: ResolvedMap, size: int, most: int) -> list[int]:
    """Every entry, looked up in ranges of up to `most` granules of a chunk."""
    entries: list[int] = []
    while len(entries) << resolved.granule_bits < size:
        first = len(entries)
        last = min(size - 1 >> resolved.granule_bits, first | CHUNK_GRANULES - 1, first + most - 1)
        entries += await with_tables(resolved._entries, first, last)
    return entries


@given(
    st.lists(shapes(), min_size=1, max_size=4),
    st.none() | RAW,
    st.lists(st.integers(0, LARGEST), max_size=10),
    st.integers(2, CHUNK_GRANULES),
)
def test_any_chain(layers: list[Shape], raw: Shape | None, known: list[int], most: int) -> None:
    async def compare() -> None:
        access = await open_chain([raw, *layers] if raw else layers)
        async with access:
            resolved = ResolvedMap(access.layers(), MetadataCache())
            for offset in known:  # so that ranges have gaps
                if offset < access.size():
                    await with_tables(resolved.entry, offset)
            found = await entries_in_ranges(resolved, access.size(), most)
            assert found == await entries_one_by_one(resolved.layers, access.size())

    trio.run(compare)


# --- the top layer changes ----------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "zero", "to zero", "to backing", "resize"]),
        st.integers(0, LARGEST - 1),
        st.integers(1, 100 << 10),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=50)
@given(
    st.lists(shapes(["none", "data", "zero"]), max_size=2),
    st.sampled_from([(9, False), (12, False), (14, True), (16, False)]),
    STEPS,
)
def test_what_is_written_and_discarded(
    below: list[Shape], top: tuple[int, bool], steps: list[tuple[str, int, int]]
) -> None:
    bits, extended = top

    async def compare() -> None:
        memory = MemoryStorage()
        await Qcow2.create(memory, LARGEST, cluster_size=1 << bits, extended_l2=extended)
        backing = await open_chain(below) if below else None
        async with FormatAccess(await Qcow2.open(memory, writable=True, backing=backing)) as image:
            for step, start, length in steps:
                start = min(start, image.size() - 1)
                length = min(length, image.size() - start)
                if step == "write":
                    await image.write(b"w" * length, start)
                elif step == "zero":
                    await image.write_zeroes(start, length)
                elif step == "to zero":
                    await image.discard_to_zero(start, length)
                elif step == "to backing":
                    await image.discard_to_backing(start, length)
                else:
                    await image.resize(max(512, start // 512 * 512))
                found = await entries_in_ranges(image._map, image.size(), CHUNK_GRANULES)
                assert found == await entries_one_by_one(image._map.layers, image.size())

    trio.run(compare)


# --- what it costs ------------------------------------------------------------------------------


def calls_of(work: Callable[..., object], *arguments: int) -> int:
    """How many Python functions `work` calls."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work(*arguments)
    finally:
        sys.setprofile(before)
    return count


async def calls_of_a_range(kind: str, overlays: int, granules: int) -> int:
    """What it takes to look up granules that the lowest layer of a chain has."""
    overlay = Shape("extended" if kind == "extended" else "qcow2", size=32 << 20)
    bottom = Shape(kind, size=32 << 20, kinds=["data"])
    async with await open_chain([bottom, *[overlay] * overlays]) as access:
        resolved = ResolvedMap(access.layers(), MetadataCache())
        await with_tables(resolved.entry, 0)  # so that the tables are in memory
        return calls_of(resolved.runs, 0, granules * resolved.granule)


@pytest.mark.parametrize("kind", ["qcow2", "extended", "raw"])
@pytest.mark.parametrize("granules", [8, CHUNK_GRANULES])
async def test_a_deep_chain_is_walked_once_for_a_range(kind: str, granules: int) -> None:
    """The cost grows with the layers, not with layers times granules."""
    few, many = [await calls_of_a_range(kind, overlays, granules) for overlays in (4, 32)]
    assert 28 <= many - few <= 28 * 6
