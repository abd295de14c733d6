"""A repair that does not end: nothing is worse, and another repair finishes it."""

from __future__ import annotations

import random

import pytest
import trio

from imagofs import PermissiveImplicitOpenGate, open_image
from imagofs.errors import FormatError, ImagofsError, StorageError
from imagofs.format.qcow2.check import Repair, check_image
from imagofs.storage.memory import MemoryStorage
from tests.qcow2.damage import CASES, Bases, Image
from tests.support.storages import (
    FaultyStorage,
    Record,
    RecordingStorage,
    SlowStorage,
    replay,
)

CUTS = 2
FAULTY = (
    "refcounts all 0",
    "refcount block in data",
    "refcount table at 0",
    "data in the L1 table",
    "snapshot's L1 table misaligned",
    "bitmap's table misaligned",
    "one bit, two guest clusters",
    "leaked cluster",
)
SECTOR = 512
PART = 32768


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


async def disk(contents: bytes) -> list[bytes | None]:
    """What the guest sees, a part at a time; None for what cannot be read."""
    storage = MemoryStorage(contents, writable=False)
    parts: list[bytes | None] = []
    image = await open_image(storage, format="qcow2", gate=PermissiveImplicitOpenGate())
    async with image:
        for offset in range(0, image.size(), PART):
            part = bytearray(min(PART, image.size() - offset))
            try:
                await image.read(part, offset)
            except ImagofsError:
                parts.append(None)
            else:
                parts.append(bytes(part))
    return parts


def torn(records: list[Record]) -> list[Record]:
    """The same writes, a record for each sector."""
    sectors: list[Record] = []
    for record in records:
        if record.kind != "write":
            sectors.append(record)
            continue
        position = 0
        while position < record.length:
            end = min(position + SECTOR - (record.offset + position) % SECTOR, record.length)
            sectors.append(
                Record(
                    record.storage,
                    "write",
                    record.began,
                    record.offset + position,
                    end - position,
                    record.data[position:end],
                )
            )
            position = end
    return sectors


@pytest.mark.parametrize("mode", ["all", "leaks"])
async def test_power_cut_in_a_repair(bases: Bases, mode: Repair):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    cuts = finished = 0
    for name, case in chance.sample(list(CASES.items()), 50):
        image = Image(bases[case.kind].data)
        case.damage(image)
        damaged = bytes(image.data)
        try:
            before = (await check_image(MemoryStorage(damaged))).exit_code
            recording = RecordingStorage(MemoryStorage(damaged))
            result = await check_image(recording, repair=mode)
        except FormatError:
            assert mode == "leaks"
            continue
        if not recording.log.records:
            continue
        assert isinstance(recording.inner, MemoryStorage)
        repaired = recording.inner.to_bytes()
        wanted = await disk(repaired)
        for _ in range(CUTS):
            cut = chance.randrange(recording.log.records[-1].began + 2)
            kept = recording.log.durable(cut)
            share = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
            lost_or_not = torn(recording.log.at_risk(cut))
            kept += [record for record in lost_or_not if chance.random() < share]
            kept.sort(key=lambda record: record.began)
            left = MemoryStorage(replay(damaged, kept))
            after_cut = await check_image(left)
            if before in (0, 3):
                assert after_cut.exit_code in (0, 3), name
            finished += after_cut.is_clean
            again = await check_image(left, repair=mode)
            assert again.exit_code == result.exit_code, name
            assert again.leaks == result.leaks, name
            assert await disk(left.to_bytes()) == wanted, name
            cuts += 1
    print(f"{cuts} cuts, {finished} of them after the last write that matters")
    assert cuts > 20


@pytest.mark.parametrize("kind", ["write", "sync", "discard"])
async def test_repair_that_fails_says_so_and_another_one_finishes_it(bases: Bases, kind: str):
    """Each call fails in turn."""
    failed = 0
    for name in FAULTY:
        image = Image(bases[CASES[name].kind].data)
        CASES[name].damage(image)
        for nth in range(1, 100):
            storage = FaultyStorage(MemoryStorage(image.data), kind, nth)
            try:
                await check_image(storage, repair="all")
            except StorageError:
                failed += 1
            else:
                assert storage.calls[kind] < nth, "the failure was not told"
                break
            assert isinstance(storage.inner, MemoryStorage)
            result = await check_image(storage.inner, repair="all")
            assert result.exit_code == 0, (name, nth)
            assert {lost.guest_offset for lost in result.lost} <= {0, 65536}
    assert failed


async def test_cancelled_repair_is_finished_by_another_one(bases: Bases):
    cancelled = 0
    for name in FAULTY:
        image = Image(bases[CASES[name].kind].data)
        CASES[name].damage(image)
        for pause in range(1, 400, 7):
            storage = SlowStorage(MemoryStorage(image.data))
            with trio.CancelScope() as scope:
                cancel = scope.cancel
                storage.on_pause = lambda n, at=pause, stop=cancel: stop() if n == at else None
                await check_image(storage, repair="all")
            assert isinstance(storage.inner, MemoryStorage)
            if not scope.cancelled_caught:
                break
            cancelled += 1
            assert (await check_image(storage.inner, repair="all")).exit_code == 0
    assert cancelled > 20
