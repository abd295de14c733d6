"""Resizing that fails, is cancelled, or meets a power cut: the disk has one of the two sizes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from imagofs import FormatAccess, ImagofsError, MemoryStorage, Qcow2, StorageError
from tests import qemu
from tests.support.storages import FaultyStorage, RecordingStorage, SlowStorage, replay

K, M = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


SIZES = [(100 * K, 140 * K), (300 * K, 5 * M), (340 * K, 100 * K), (500 * K, 9 * K)]


async def _image(storage: Any) -> FormatAccess:
    return FormatAccess(await Qcow2.open(storage, writable=True))


async def _new(size: int) -> tuple[MemoryStorage, bytes]:
    """A storage with an image of clusters of 512 bytes, and its contents."""
    memory = MemoryStorage()
    await Qcow2.create(memory, size, cluster_size=512)
    image = await _image(memory)
    contents = (b"contents" * -(-size // 8))[:size]
    await image.write(contents, 0)
    await image.sync()
    await image.driver.close()
    memory.closed = False
    return memory, contents


def _checked(data: bytes, contents: bytes, sizes: set[int], *, leaks: bool) -> int:
    """See that an image has one of the sizes, and its old contents; return its size."""
    path = Path("found")
    path.write_bytes(data)
    qemu.check(path, leaks=leaks)
    found = qemu.contents(path)
    assert len(found) in sizes
    kept = min(sizes)
    assert found[:kept] == contents[:kept]
    if len(found) > len(contents):
        assert not any(found[len(contents) :])
    return len(found)


@pytest.mark.parametrize(("old", "new"), SIZES)
async def test_power_cuts(old: int, new: int) -> None:
    memory, contents = await _new(old)
    before = memory.to_bytes()
    storage = RecordingStorage(memory)
    image = await _image(storage)
    # Something that waits for a flush, too.
    await image.write(contents[:700], 0)
    await image.resize(new)
    log = storage.log
    numbers = random.Random(old + new)
    times = sorted({record.began for record in log.records}) + [next(log.clock)]
    seen = set()
    for time in numbers.sample(times, min(len(times), 12)) + times[-1:]:
        durable, at_risk = log.durable(time), log.at_risk(time)
        for _ in range(3):
            kept = {id(r) for r in durable} | {id(r) for r in at_risk if numbers.random() < 0.5}
            found = replay(before, [record for record in log.records if id(record) in kept])
            seen.add(_checked(found, contents, {old, new}, leaks=True))
    assert new in seen
    await image.close()
    assert _checked(memory.to_bytes(), contents, {old, new}, leaks=False) == new


@pytest.mark.parametrize(("old", "new"), SIZES)
async def test_failures(old: int, new: int) -> None:
    """A storage that fails at any call: the image can go on, or at least be opened again."""
    memory, contents = await _new(old)
    before = memory.to_bytes()
    counting = FaultyStorage(MemoryStorage(before))
    image = await _image(counting)
    calls = counting.calls["any"]
    await image.resize(new)
    calls = counting.calls["any"] - calls
    assert calls > 4
    numbers = random.Random(new)
    for number in sorted(numbers.sample(range(1, calls + 1), min(calls, 12))):
        memory = MemoryStorage(before)
        faulty = FaultyStorage(memory)
        image = await _image(faulty)
        faulty.kind, faulty.nth = "any", faulty.calls["any"] + number
        try:
            await image.resize(new)
        except (StorageError, ImagofsError):
            assert image.size() in (old, new)
        else:
            assert image.size() == new
        faulty.kind = None
        _checked(memory.to_bytes(), contents, {old, new}, leaks=True)
        if image.driver.metadata.lost is None:  # type: ignore[attr-defined]
            await image.resize(new)
            await image.close()
            assert _checked(memory.to_bytes(), contents, {old, new}, leaks=True) == new
        else:
            with pytest.raises(ImagofsError):
                await image.close()


def _cancel_at(number: int, scope: trio.CancelScope) -> Callable[[int], None]:
    return lambda pause: scope.cancel() if pause == number else None


@pytest.mark.parametrize(("old", "new"), SIZES)
async def test_cancelled_anywhere(old: int, new: int) -> None:
    memory, contents = await _new(old)
    before = memory.to_bytes()
    slow = SlowStorage(MemoryStorage(before))
    image = await _image(slow)
    pauses = slow.pauses
    await image.resize(new)
    pauses = slow.pauses - pauses
    numbers = random.Random(new)
    cancelled_early = 0
    for number in sorted(numbers.sample(range(1, pauses + 1), min(pauses, 12))):
        memory = MemoryStorage(before)
        slow = SlowStorage(memory)
        image = await _image(slow)
        with trio.CancelScope() as scope:
            slow.on_pause = _cancel_at(slow.pauses + number, scope)
            await image.resize(new)
        slow.on_pause = None
        # Once the size is written, there is space to return, and that may be cancelled too.
        assert image.size() == new or (scope.cancelled_caught and image.size() == old)
        cancelled_early += image.size() == old
        await image.sync()
        _checked(memory.to_bytes(), contents, {old, new}, leaks=False)
        await image.resize(new)
        await image.close()
        assert _checked(memory.to_bytes(), contents, {old, new}, leaks=False) == new
    assert cancelled_early > 3
