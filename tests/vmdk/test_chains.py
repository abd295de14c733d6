"""Deltas and their parents."""

from __future__ import annotations

import pytest

from imagofs.access import FormatAccess
from imagofs.errors import ChainError, FormatError, GateDeniedError
from imagofs.format.raw import Raw
from imagofs.format.vmdk import Vmdk
from imagofs.gate import DenyImplicitOpenGate, PermissiveImplicitOpenGate
from imagofs.mapping import IndirectMapping, RawMapping, ZeroMapping
from imagofs.opening import open_image
from imagofs.storage import MemoryStorage
from tests import qemu
from tests.vmdk.build import (
    GRAIN,
    ZERO_GRAIN,
    FolderOpener,
    build_sparse,
    open_folder_vmdk,
    pack_descriptor,
    pattern,
    read_all,
)


def delta(
    folder, name, grains, capacity_sectors, *, parent, parent_cid, cid="0000beef", **how
) -> None:
    """A delta in one sparse file."""
    text = pack_descriptor(
        f'RW {capacity_sectors} SPARSE "{name}"',
        cid=cid,
        parent=parent,
        parent_cid=parent_cid,
        create_type="monolithicSparse",
    )
    (folder / name).write_bytes(build_sparse(grains, capacity_sectors, descriptor=text, **how))


def base(folder, capacity_sectors, cid="abcd1234") -> bytes:
    """A flat base image; returns its contents."""
    data = pattern(99, capacity_sectors * 512)
    (folder / "base-flat").write_bytes(data)
    text = pack_descriptor(f'RW {capacity_sectors} FLAT "base-flat" 0', cid=cid, create_type="vmfs")
    (folder / "base.vmdk").write_bytes(text)
    return data


async def test_a_chain_that_qemu_made(tmp_path):
    size = 8 << 20
    names = ["base.vmdk", "one.vmdk", "two.vmdk"]
    for number, name in enumerate(names):
        qemu.create(
            tmp_path / name,
            size if number == 0 else None,
            fmt="vmdk",
            backing=names[number - 1] if number else None,
            backing_fmt="vmdk",
            writes=[f"write -P {number + 1} {(2 * number + 1) << 20} 3M"],
        )
    expected = qemu.contents(tmp_path / "two.vmdk", "vmdk")
    async with FormatAccess(await open_folder_vmdk(tmp_path / "two.vmdk")) as image:
        assert len(image.layers()) == 3
        assert await read_all(image) == expected
        assert await read_all(image, 96 << 10) == expected
        details = image.driver.details()
        assert details == qemu.info(tmp_path / "two.vmdk")["format-specific"]["data"]
        below = image.driver.backing
        assert below is not None
        mapping = await image.driver.get_mapping(0, size)
        assert mapping == IndirectMapping(5 << 20, below, 0)
    gate = PermissiveImplicitOpenGate()
    async with await open_image(tmp_path / "two.vmdk", gate=gate) as image:
        assert await read_all(image) == expected


async def test_the_gate_is_asked_for_extents_and_parents(tmp_path):
    data = base(tmp_path, 64)
    delta(tmp_path, "delta.vmdk", {}, 64, parent="base.vmdk", parent_cid="abcd1234")
    with pytest.raises(GateDeniedError, match=r"base\.vmdk"):
        await open_image(tmp_path / "delta.vmdk", gate=DenyImplicitOpenGate())
    with pytest.raises(GateDeniedError, match="base-flat"):
        await open_image(tmp_path / "base.vmdk")
    async with await open_image(
        tmp_path / "delta.vmdk", gate=PermissiveImplicitOpenGate()
    ) as image:
        assert await read_all(image) == data


@pytest.mark.parametrize("how", [{}, {"compressed": True}, {"compressed": True, "footer": True}])
async def test_grains_of_a_delta_hide_the_parents(how, tmp_path):
    data = base(tmp_path, 100)
    grains = {1: pattern(1, GRAIN), 2: ZERO_GRAIN, 6: pattern(6, 4 * 512)}
    delta(tmp_path, "d.vmdk", grains, 100, parent="base.vmdk", parent_cid="abcd1234", **how)
    expected = data[:GRAIN] + grains[1] + bytes(GRAIN) + data[3 * GRAIN : 6 * GRAIN] + grains[6]
    async with FormatAccess(await open_folder_vmdk(tmp_path / "d.vmdk")) as image:
        assert await read_all(image) == expected == qemu.contents(tmp_path / "d.vmdk", "vmdk")
        mapping = await image.get_mapping(0, 1 << 20)
        assert isinstance(mapping, RawMapping)
        assert not mapping.writable
        assert await image.get_mapping(2 * GRAIN, GRAIN) == ZeroMapping(GRAIN, explicit=True)


@pytest.mark.parametrize("base_sectors", [1, 40, 47, 200])
async def test_parents_of_another_length(base_sectors, tmp_path):
    data = base(tmp_path, base_sectors)
    delta(
        tmp_path, "d.vmdk", {3: pattern(3, GRAIN)}, 100, parent="base.vmdk", parent_cid="abcd1234"
    )
    shown = data[: 100 * 512].ljust(100 * 512, b"\0")
    expected = shown[: 3 * GRAIN] + pattern(3, GRAIN) + shown[4 * GRAIN :]
    async with FormatAccess(await open_folder_vmdk(tmp_path / "d.vmdk")) as image:
        assert await read_all(image) == expected
        assert await read_all(image, 512) == expected


async def test_a_parent_that_was_changed_is_refused(tmp_path):
    base(tmp_path, 64, cid="abcd1235")
    delta(tmp_path, "d.vmdk", {}, 64, parent="base.vmdk", parent_cid="abcd1234")
    with pytest.raises(ChainError, match=r"abcd1235.*abcd1234"):
        await open_folder_vmdk(tmp_path / "d.vmdk")
    with pytest.raises(ChainError):
        await open_image(tmp_path / "d.vmdk", gate=PermissiveImplicitOpenGate())
    # qemu reads nothing of such a chain either.
    with pytest.raises(AssertionError):
        qemu.contents(tmp_path / "d.vmdk", "vmdk")


async def test_a_parent_without_a_content_id_is_refused(tmp_path):
    base(tmp_path, 64)
    text = pack_descriptor('RW 64 FLAT "base-flat" 0', cid=None)
    (tmp_path / "base.vmdk").write_bytes(text)
    delta(tmp_path, "d.vmdk", {}, 64, parent="base.vmdk", parent_cid="abcd1234")
    with pytest.raises(ChainError, match="is none"):
        await open_folder_vmdk(tmp_path / "d.vmdk")


async def test_writing_to_a_parent_is_found_out_by_its_delta(tmp_path):
    base(tmp_path, 64)
    delta(tmp_path, "d.vmdk", {}, 64, parent="base.vmdk", parent_cid="abcd1234")
    await FormatAccess(await open_folder_vmdk(tmp_path / "d.vmdk")).close()
    async with FormatAccess(await open_folder_vmdk(tmp_path / "base.vmdk", writable=True)) as image:
        await image.write(b"x" * 512, 0)
    with pytest.raises(ChainError, match="changed"):
        await open_folder_vmdk(tmp_path / "d.vmdk")


@pytest.mark.parametrize(
    ("parent", "parent_cid", "message"),
    [
        ("base.vmdk", "ffffffff", "no parentCID"),
        ("base.vmdk", None, "no parentCID"),
        (None, "abcd1234", "does not name it"),
    ],
)
async def test_descriptors_that_contradict_themselves(parent, parent_cid, message, tmp_path):
    base(tmp_path, 64)
    delta(tmp_path, "d.vmdk", {}, 64, parent=parent, parent_cid=parent_cid)
    with pytest.raises(FormatError, match=message):
        await open_folder_vmdk(tmp_path / "d.vmdk")
    # Who says which parent it is need not be told.
    driver = await open_folder_vmdk(tmp_path / "d.vmdk", backing=None)
    async with FormatAccess(driver) as image:
        assert await read_all(image) == bytes(64 * 512)


async def test_a_parent_of_ones_own_choice(tmp_path):
    delta(tmp_path, "d.vmdk", {1: pattern(1, GRAIN)}, 64, parent="missing", parent_cid="1")
    data = pattern(5, 64 * 512)
    memory = MemoryStorage(len(data))
    await memory.writev([memoryview(data)], 0)
    opener = FolderOpener(tmp_path)
    driver = await open_folder_vmdk(
        tmp_path / "d.vmdk", opener=opener, backing=FormatAccess(Raw(memory))
    )
    async with FormatAccess(driver) as image:
        assert await read_all(image) == data[:GRAIN] + pattern(1, GRAIN) + data[2 * GRAIN :]
    assert opener.asked == []


async def test_opening_by_path_with_a_gate(tmp_path):
    data = base(tmp_path, 64)
    delta(tmp_path, "d.vmdk", {}, 64, parent="base.vmdk", parent_cid="abcd1234")
    gate = PermissiveImplicitOpenGate()
    driver = await Vmdk.open(tmp_path / "d.vmdk", gate=gate)
    async with FormatAccess(driver) as image:
        assert await read_all(image) == data
    with pytest.raises(GateDeniedError, match="gate="):
        await Vmdk.open(tmp_path / "d.vmdk")
    driver = await Vmdk.open(tmp_path / "d.vmdk", backing=None)
    async with FormatAccess(driver) as image:
        assert await read_all(image) == bytes(64 * 512)


async def test_loops_are_found(tmp_path):
    delta(tmp_path, "a.vmdk", {}, 64, parent="b.vmdk", parent_cid="2", cid="1")
    delta(tmp_path, "b.vmdk", {}, 64, parent="a.vmdk", parent_cid="1", cid="2")
    (tmp_path / "self.vmdk").write_bytes(pack_descriptor('RW 1 FLAT "self.vmdk" 0'))
    (tmp_path / "own.vmdk").write_bytes(pack_descriptor('RW 1 SPARSE "own.vmdk"'))
    for name in ("a.vmdk", "self.vmdk", "own.vmdk"):
        with pytest.raises(ChainError):
            await open_image(tmp_path / name, gate=PermissiveImplicitOpenGate())


async def test_nothing_stays_open_when_opening_fails(tmp_path):
    base(tmp_path, 64)
    (tmp_path / "d.vmdk").write_bytes(
        pack_descriptor('RW 64 FLAT "base-flat" 0', 'RW 1 FLAT "missing" 0')
    )
    opener = FolderOpener(tmp_path)
    with pytest.raises(OSError, match="missing"):
        await open_folder_vmdk(tmp_path / "d.vmdk", opener=opener)
    (storage,) = opener.opened
    with pytest.raises(ValueError, match="closed"):
        await storage.readv([memoryview(bytearray(1))], 0)
