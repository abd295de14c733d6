"""Any layout of extents, against a model: what is read, mapped and written."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from imagofs.access import FormatAccess
from imagofs.errors import ReadOnlyError, UnsupportedError
from imagofs.mapping import RawMapping, SpecialMapping, ZeroMapping
from tests.vmdk.build import (
    GRAIN_SECTORS,
    SECTOR,
    ZERO_GRAIN,
    build_sparse,
    open_folder_vmdk,
    pack_descriptor,
    pattern,
    read_all,
)

FLAT_SECTORS = 300

#: Kind, access, sectors, offset in sectors, and what each grain is.
Extent = tuple[str, str, int, int, list[str]]


@st.composite
def _layouts(draw):
    """A disk's extents."""
    extents = []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["FLAT", "VMFS", "ZERO", "SPARSE", "DEFLATED", "NOACCESS"]))
        sectors = draw(st.sampled_from([1, 2, 15, 16, 17, 63, 64, 128, 200]))
        sparse = kind in ("SPARSE", "DEFLATED")
        access = "RDONLY" if sparse else draw(st.sampled_from(["RW", "RW", "RDONLY"]))
        offset = draw(st.integers(0, FLAT_SECTORS - sectors))
        count = -(-sectors // GRAIN_SECTORS)
        grains = draw(st.lists(st.sampled_from("-0d"), min_size=count, max_size=count))
        extents.append((kind, access, sectors, offset, grains if sparse else []))
    return extents


class Model:
    """The files of a layout, and what the disk must show."""

    def __init__(self, folder: Path, layout: list[Extent]) -> None:
        self.flat = bytearray(pattern(77, FLAT_SECTORS * SECTOR))
        self.layout = layout
        self.fixed: dict[int, bytes] = {}
        lines = []
        for number, (kind, access, sectors, offset, kinds) in enumerate(layout):
            if kind in ("FLAT", "VMFS"):
                lines.append(f'{access} {sectors} {kind} "flat" {offset}')
            elif kind == "ZERO":
                lines.append(f"{access} {sectors} ZERO")
                self.fixed[number] = bytes(sectors * SECTOR)
            elif kind == "NOACCESS":
                lines.append(f'NOACCESS {sectors} FLAT "missing" 0')
            else:
                grains, contents = {}, b""
                for index, letter in enumerate(kinds):
                    length = min(GRAIN_SECTORS, sectors - index * GRAIN_SECTORS) * SECTOR
                    data = pattern(100 * number + index + 1, length)
                    contents += data if letter == "d" else bytes(length)
                    if letter != "-":
                        grains[index] = data if letter == "d" else ZERO_GRAIN
                image = build_sparse(grains, sectors, compressed=kind == "DEFLATED")
                (folder / f"s{number}").write_bytes(image)
                lines.append(f'{access} {sectors} SPARSE "s{number}"')
                self.fixed[number] = contents
        (folder / "flat").write_bytes(self.flat)
        (folder / "disk.vmdk").write_bytes(pack_descriptor(*lines))

    def sectors(self) -> list[tuple[str, str, int]]:
        """Kind, access and flat offset of each sector of the disk."""
        result = []
        for kind, access, sectors, offset, _ in self.layout:
            result += [(kind, access, (offset + n) * SECTOR) for n in range(sectors)]
        return result

    def contents(self) -> bytes:
        """What the disk shows now; NOACCESS as exclamation marks."""
        shown = b""
        for number, (kind, _, sectors, offset, _) in enumerate(self.layout):
            if kind in ("FLAT", "VMFS"):
                shown += self.flat[offset * SECTOR : (offset + sectors) * SECTOR]
            else:
                shown += self.fixed.get(number, b"!" * sectors * SECTOR)
        return shown


@settings(max_examples=60)
@given(layout=_layouts(), data=st.data())
def test_any_layout_reads_and_maps_as_it_should(tmp_path_factory, layout, data):
    folder = tmp_path_factory.getbasetemp()
    model = Model(folder, layout)
    expected, sectors = model.contents(), model.sectors()
    ranges = [
        (start, data.draw(st.integers(1, len(expected) - start)))
        for start in data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=12))
    ]

    async def check() -> None:
        async with FormatAccess(await open_folder_vmdk(folder / "disk.vmdk")) as image:
            assert image.size() == len(expected)
            for start, length in ranges:
                part = bytearray(length)
                touched = sectors[start // SECTOR : (start + length - 1) // SECTOR + 1]
                if any(kind == "NOACCESS" for kind, _, _ in touched):
                    with pytest.raises(UnsupportedError, match="NOACCESS"):
                        await image.read(part, start)
                    continue
                await image.read(part, start)
                assert part == expected[start : start + length]
            position = 0
            async for start, mapping in image.map():
                assert start == position
                position += mapping.length
                shown = expected[start:position]
                match mapping:
                    case RawMapping():
                        raw = bytearray(mapping.length)
                        await mapping.storage.readv([memoryview(raw)], mapping.offset)
                        assert raw == shown
                        assert not mapping.writable
                    case ZeroMapping():
                        assert shown == bytes(len(shown))
                    case SpecialMapping():
                        kinds = sectors[start // SECTOR : position // SECTOR]
                        assert {kind for kind, _, _ in kinds} <= {"DEFLATED", "NOACCESS"}
            assert position == len(expected)

    trio.run(check)


@settings(max_examples=60)
@given(layout=_layouts(), data=st.data())
def test_any_layout_is_written_where_it_may_be(tmp_path_factory, layout, data):
    folder = tmp_path_factory.getbasetemp()
    model = Model(folder, layout)
    sectors = model.sectors()
    size = len(sectors) * SECTOR
    changes = [
        (start, data.draw(st.integers(1, size - start)), data.draw(st.sampled_from("wwwzd")))
        for start in data.draw(st.lists(st.integers(0, size - 1), max_size=12))
    ]

    def apply(start: int, contents: bytes) -> None:
        for at in range(start, start + len(contents)):
            kind, _, place = sectors[at // SECTOR]
            if kind != "ZERO":
                model.flat[place + at % SECTOR] = contents[at - start]

    async def check() -> None:
        driver = await open_folder_vmdk(folder / "disk.vmdk", writable=True)
        async with FormatAccess(driver) as image:
            for number, (start, length, change) in enumerate(changes):
                touched = sectors[start // SECTOR : (start + length - 1) // SECTOR + 1]
                allowed = all(
                    (kind in ("FLAT", "VMFS") and access == "RW")
                    or (kind == "ZERO" and change != "w")
                    for kind, access, _ in touched
                )
                contents = pattern(number + 9000, length) if change == "w" else bytes(length)
                try:
                    if change == "w":
                        await image.write(contents, start)
                    elif change == "z":
                        await image.write_zeroes(start, length)
                    else:
                        await image.discard_to_zero(start, length)
                except ReadOnlyError:
                    assert not allowed
                else:
                    assert allowed
                    apply(start, contents)
            if not any(kind == "NOACCESS" for kind, _, _ in sectors):
                assert await read_all(image) == model.contents()

    trio.run(check)
    assert (folder / "flat").read_bytes() == model.flat
