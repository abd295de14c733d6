"""Creating that fails, is cancelled, or meets a power cut: no half-made image is left."""

from __future__ import annotations

import itertools
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from imagofs import (
    ImagofsError,
    MemoryStorage,
    PreallocateMode,
    Qcow2,
    StorageError,
    create_image,
)
from tests.support.storages import FaultyStorage, RecordingStorage, SlowStorage, replay


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


async def _create(storage: Any, **options: Any) -> None:
    await Qcow2.create(storage, 1 << 20, cluster_size=512, **options)


async def test_power_cuts_leave_no_half_made_image() -> None:
    memory = MemoryStorage(b"QFI\xfb" + struct.pack(">I", 3) + b"old image" * 2000)
    before = memory.to_bytes()
    storage = RecordingStorage(memory)
    await _create(storage, overwrite=True, preallocate=PreallocateMode.FORMAT_ALLOCATE)
    after = memory.to_bytes()
    log = storage.log
    random_numbers = random.Random(4)
    seen = 0
    for time in {record.began for record in log.records} | {next(log.clock)}:
        durable, at_risk = log.durable(time), log.at_risk(time)
        for _ in range(8):
            kept = {id(r) for r in durable} | {
                id(r) for r in at_risk if random_numbers.random() < 0.5
            }
            found = replay(before, [record for record in log.records if id(record) in kept])
            if found[:4] == b"QFI\xfb" and found[:512] != before[:512]:
                assert found == after
                seen += 1
            elif found:
                assert found[:4] != b"QFI\xfb" or found == before
    assert seen


async def test_failures_are_told_and_leave_no_image() -> None:
    counting = FaultyStorage(MemoryStorage())
    await _create(counting)
    total = counting.calls["any"]
    assert total > 5
    for number in range(1, total + 1):
        memory = MemoryStorage()
        with pytest.raises(StorageError, match="injected"):
            await _create(FaultyStorage(memory, "any", number))
        # Only the last sync may fail behind a header.
        assert memory.to_bytes()[:4] != b"QFI\xfb" or number >= total


def _cancel_at(number: int, scope: trio.CancelScope) -> Callable[[int], None]:
    return lambda pause: scope.cancel() if pause == number else None


async def test_cancelled_anywhere() -> None:
    for number in itertools.count(1):
        memory = MemoryStorage()
        with trio.CancelScope() as scope:
            slow = SlowStorage(memory, on_pause=_cancel_at(number, scope))
            await _create(slow)
        if not scope.cancelled_caught:
            assert memory.to_bytes()[:4] == b"QFI\xfb"
            break
        if memory.to_bytes()[:4] == b"QFI\xfb":
            # The header was written, and what waits is its sync.
            assert slow.pauses >= number
    assert number > 10


async def test_a_failed_file_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise StorageError("no space")

    monkeypatch.setattr("imagofs.creating.write_image", fail)
    with pytest.raises(ImagofsError, match="no space"):
        await create_image("image", "qcow2", 1 << 20, data_file="guest.data")
    assert os.listdir() == []
    Path("image").write_bytes(b"old")
    with pytest.raises(ImagofsError, match="no space"):
        await create_image("image", "qcow2", 1 << 20, overwrite=True)
    assert Path("image").read_bytes() == b""


async def test_storages_stay_open() -> None:
    storage = MemoryStorage()
    await Qcow2.create(storage, 1 << 20)
    driver = await Qcow2.open(storage, writable=True)
    assert driver.size() == 1 << 20
    await driver.close()
    with pytest.raises(StorageError, match="not empty"):
        await Qcow2.create(MemoryStorage(512), 1 << 20)
