"""Damage of many kinds: it is found, it is repaired, and what can be kept is kept.

qemu-img is asked before (it must not find more than imagofs does) and afterwards (it must find
nothing at all).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imagofs.errors import FormatError, ReadOnlyError
from imagofs.format.qcow2.check import Repair, check_image
from imagofs.format.qcow2.check_report import CheckResult, LostRange
from imagofs.format.qcow2.repair_preview import preview_repair
from imagofs.storage.base import StorageOpenOptions
from imagofs.storage.file import FileStorage
from imagofs.storage.memory import MemoryStorage
from tests import qemu
from tests.qcow2.damage import CASES, INCOMPATIBLE, L1_OFFSET, MIB, Bases, Image


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def qemu_check(path: Path, *options: str) -> dict[str, Any] | None:
    """What qemu-img finds (or still finds, after a repair); None if it does not open the image."""
    output = qemu.qemu_img("check", "-f", "qcow2", "--output=json", *options, path, ok=(0, 1, 2, 3))
    if not output:
        return None
    report: dict[str, Any] = json.loads(output)
    return report


async def check(path: Path, repair: Repair | None = None) -> CheckResult:
    options = StorageOpenOptions(writable=repair is not None)
    async with await FileStorage.open(path, options) as storage:
        return await check_image(storage, repair=repair)


def is_clean(report: dict[str, Any] | None) -> bool:
    return report is not None and not any(
        report.get(key) for key in ("corruptions", "leaks", "check-errors")
    )


@pytest.mark.parametrize("name", CASES)
async def test_damage_is_found_and_repaired(tmp_path: Path, bases: Bases, name: str):
    case = CASES[name]
    base = bases[case.kind]
    image = Image(base.data)
    case.damage(image)
    path = tmp_path / "damaged.qcow2"
    path.write_bytes(image.data)

    theirs = qemu_check(path)
    try:
        found = await check(path)
    except FormatError:
        # Neither of them opens it.
        assert theirs is None
    else:
        marked = image.data[INCOMPATIBLE + 7] & 3 if image.u32(4) > 2 else 0
        assert found.exit_code or marked
        if theirs is not None and case.follows:
            assert found.corruptions + found.check_errors >= theirs.get("corruptions", 0)
            assert found.leaks >= theirs.get("leaks", 0)
            assert bool(found.check_errors) == bool(theirs["check-errors"])
            assert found.total_clusters == theirs["total-clusters"]
        assert path.read_bytes() == image.data

    repaired = await check(path, "all")
    assert repaired.exit_code == 0
    assert is_clean(qemu_check(path))
    assert not path.read_bytes()[INCOMPATIBLE + 7] & 3 or image.u32(4) == 2

    expected = bytearray(base.contents)
    if case.expect is not None:
        case.expect(expected)
    for offset, length in case.lost:
        expected[offset : offset + length] = bytes(length)
    assert repaired.lost == tuple(LostRange(*lost) for lost in case.lost)
    assert case.notes in " ".join(repaired.notes)
    assert bool(case.notes) == bool(repaired.notes)
    assert qemu.contents(path) == expected

    # The second time there is nothing to do, and nothing is done.
    after = path.read_bytes()
    again = await check(path, "all")
    assert again.exit_code == again.corruptions_fixed == again.leaks_fixed == 0
    assert path.read_bytes() == after


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.gives_up])
def test_qemu_gives_up_on_what_is_said_so(tmp_path: Path, bases: Bases, name: str):
    image = Image(bases[CASES[name].kind].data)
    CASES[name].damage(image)
    path = tmp_path / "damaged.qcow2"
    path.write_bytes(image.data)
    qemu_check(path, "-r", "all")
    assert not is_clean(qemu_check(path))


def damaged(bases: Bases, *names: str) -> bytes:
    """An image with several kinds of damage."""
    image = Image(bases[CASES[names[0]].kind].data)
    for name in names:
        CASES[name].damage(image)
    return bytes(image.data)


async def test_damage_of_all_kinds_at_once(tmp_path: Path, bases: Bases):
    """What the kinds have done together cannot be told one by one, but all of it is repaired."""
    path = tmp_path / "damaged.qcow2"
    for kind in {case.kind for case in CASES.values()}:
        image = Image(bases[kind].data)
        for name, case in CASES.items():
            if case.kind == kind and "L2 table" not in name and "truncated" not in name:
                try:
                    case.damage(image)
                except (IndexError, ValueError):
                    continue  # it went by what an earlier damage has destroyed
        path.write_bytes(image.data)
        try:
            result = await check(path, "all")
        except FormatError:
            continue  # the L1 table's place is not known any more
        assert result.exit_code == 0
        assert is_clean(qemu_check(path)), kind


async def test_leaks_are_given_back_though_more_is_wrong(bases: Bases):
    storage = MemoryStorage(damaged(bases, "leaked cluster", "data in the L1 table"))
    result = await check_image(storage, repair="leaks")
    assert (result.exit_code, result.corruptions, result.leaks) == (2, 1, 0)
    assert result.leaks_fixed == 2
    assert not result.lost
    # The damaged entry is as it was: only "all" may give data up.
    image = Image(storage.to_bytes())
    assert image.entry(0) == image.l1 | 1 << 63


async def test_what_only_seems_leaked_is_not_given_back(bases: Bases):
    """Behind an L2 table that cannot be followed there may be data: it must not be freed."""
    contents = damaged(bases, "L2 table misaligned")
    storage = MemoryStorage(contents)
    result = await check_image(storage, repair="leaks")
    assert result.exit_code == 2
    assert result.leaks == 8
    assert not result.leaks_fixed
    assert "use --repair all" in result.notes[0]
    assert storage.to_bytes() == contents


@pytest.mark.parametrize("mode", ["leaks", "all"])
async def test_freed_clusters_are_punched_out_of_the_file(tmp_path: Path, mode: Repair):
    path = qemu.create(tmp_path / "a.qcow2", "8M", writes=["write -P 1 0 4M"])
    image = Image(path.read_bytes())
    for guest_offset in range(MIB, 3 * MIB, image.cluster):
        image.put(image.place(guest_offset), 0)
    path.write_bytes(image.data)
    before = path.stat().st_blocks
    result = await check(path, mode)
    assert (result.exit_code, result.leaks_fixed) == (0, 32)
    assert path.stat().st_blocks <= before - 2 * MIB // 512
    assert is_clean(qemu_check(path))


async def test_leak_with_a_flag_to_set(bases: Bases):
    """A refcount that falls to 1 makes the cluster the disk's own: the flag goes with it."""
    image = Image(bases["plain"].data)
    image.put(image.place(0), image.host(0))
    image.set_refcount(image.host(0), 2)
    storage = MemoryStorage(image.data)
    assert (await check_image(storage)).exit_code == 3
    assert (await check_image(storage, repair="leaks")).exit_code == 0
    repaired = Image(storage.to_bytes())
    assert repaired.entry(0) == repaired.host(0) | 1 << 63


async def test_preview_tells_what_would_be_lost_and_changes_nothing(bases: Bases):
    contents = damaged(bases, "data in the L1 table", "data behind the end in version 2")
    storage = MemoryStorage(contents, writable=False)
    result = await preview_repair(storage)
    assert result.exit_code == 0
    assert result.lost == (LostRange(0, 65536),)
    assert storage.to_bytes() == contents
    with pytest.raises(ReadOnlyError):
        await check_image(storage, repair="all")


async def test_image_without_a_known_l1_table_is_refused(bases: Bases):
    image = Image(bases["plain"].data)
    image.put(L1_OFFSET, 12345)
    storage = MemoryStorage(image.data)
    repairs: tuple[Repair | None, ...] = (None, "leaks", "all")
    for repair in repairs:
        with pytest.raises(FormatError, match="the L1 table's offset"):
            await check_image(storage, repair=repair)
    assert storage.to_bytes() == image.data


async def test_corrupt_bit_stays_as_long_as_something_is_wrong(bases: Bases):
    storage = MemoryStorage(damaged(bases, "corrupt bit", "data in the L1 table"))
    assert (await check_image(storage, repair="leaks")).exit_code == 2
    assert Image(storage.to_bytes()).data[INCOMPATIBLE + 7] == 2
    assert (await check_image(storage, repair="all")).exit_code == 0
    assert Image(storage.to_bytes()).data[INCOMPATIBLE + 7] == 0


async def test_snapshots_survive_the_repair_of_the_disk(tmp_path: Path, bases: Bases):
    path = tmp_path / "a.qcow2"
    path.write_bytes(
        damaged(bases, "data in the snapshot table", "refcounts wrong, with snapshots")
    )
    assert (await check(path, "all")).exit_code == 0
    whole = tmp_path / "b.qcow2"
    whole.write_bytes(bases["snapshots"].data)
    for name in ("one", "two"):
        flat = [tmp_path / "1.raw", tmp_path / "2.raw"]
        for image, target in zip((path, whole), flat, strict=True):
            qemu.qemu_img("convert", "-l", f"snapshot.name={name}", "-O", "raw", image, target)
        assert flat[0].read_bytes() == flat[1].read_bytes()


async def test_loss_in_a_snapshot_is_told_with_its_name(bases: Bases):
    image = Image(bases["snapshots"].data)
    snapshot_l1 = image.u64(image.snapshot_entry())
    l2 = image.u64(snapshot_l1) & (1 << 56) - 512
    image.put(l2, 1 << 45)
    storage = MemoryStorage(image.data)
    result = await check_image(storage, repair="all")
    assert result.exit_code == 0
    assert result.lost == (LostRange(0, 65536, "one"),)
