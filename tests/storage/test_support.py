"""The storages that other tests rely on do what they say."""

import errno

import pytest
import trio

from imagofs.errors import StorageError
from imagofs.storage import MemoryStorage
from tests.support.storages import (
    KINDS,
    FaultyStorage,
    Log,
    RecordingStorage,
    SlowStorage,
    StrictStorage,
    replay,
)


def calls_of(storage):
    """A call for each kind."""
    return {
        "read": lambda: storage.readv([memoryview(bytearray(8))], 0),
        "write": lambda: storage.writev([memoryview(b"x" * 8)], 0),
        "zero": lambda: storage.write_zeroes(0, 8),
        "discard": lambda: storage.discard(0, 4096),
        "resize": lambda: storage.resize(8192),
        "flush": storage.flush,
        "sync": storage.sync,
    }


@pytest.mark.parametrize("kind", KINDS)
async def test_faulty_fails_the_nth_call_of_its_kind_only(kind):
    storage = FaultyStorage(MemoryStorage(8192), kind, 2, error=errno.ENOSPC)
    calls = calls_of(storage)
    for round_number in (1, 2, 3):
        for name, call in calls.items():
            if (name, round_number) == (kind, 2):
                with pytest.raises(StorageError) as caught:
                    await call()
                assert caught.value.errno == errno.ENOSPC
            else:
                await call()
    assert storage.calls == {**dict.fromkeys(KINDS, 3), "any": 21}


async def test_faulty_any_forever_and_partial():
    inner = MemoryStorage(bytes(100))
    storage = FaultyStorage(inner, "any", 3, forever=True, partial=True)
    await storage.sync()
    await storage.flush()
    for _ in range(2):
        with pytest.raises(StorageError):
            await storage.writev([memoryview(b"x" * 100)], 0)
    assert inner.to_bytes() == b"x" * 50 + bytes(50)
    storage.kind = None
    await storage.writev([memoryview(b"y" * 100)], 0)
    storage.fail_next("sync", error=errno.EDQUOT)
    with pytest.raises(StorageError) as caught:
        await storage.sync()
    assert caught.value.errno == errno.EDQUOT
    await storage.sync()


async def test_recording_tells_what_a_power_cut_may_take():
    log = Log()
    inner = MemoryStorage(b"0" * 10)
    storage = RecordingStorage(inner, log)
    other = RecordingStorage(MemoryStorage(10), log, "data")
    await storage.writev([memoryview(b"ab"), memoryview(b"c")], 2)
    await other.writev([memoryview(b"x")], 0)
    await storage.sync()
    moment = next(log.clock)
    assert storage.writev_nowait([memoryview(b"d")], 9) == 1
    await storage.write_zeroes(0, 1)
    await storage.resize(12)
    names = [(record.storage, record.kind) for record in log.records]
    assert names == [
        ("image", "write"),
        ("data", "write"),
        ("image", "sync"),
        ("image", "write"),
        ("image", "zero"),
        ("image", "resize"),
    ]
    first, foreign, _sync, nowait, zero, resize = log.records
    assert log.durable() == [first]
    assert log.at_risk() == [foreign, nowait, zero, resize]
    assert log.at_risk(moment) == [foreign]
    assert log.durable(_sync.began) == []
    own = [record for record in log.records if record.storage == "image"]
    assert replay(b"0" * 10, own) == inner.to_bytes() == b"\x000abc0000d\0\0"
    assert replay(b"0" * 10, [first, resize]) == b"00abc00000\0\0"
    assert replay(b"0" * 10, [nowait]) == b"000000000d"


async def test_a_sync_does_not_cover_what_was_in_flight():
    log = Log()
    slow = SlowStorage(MemoryStorage(100))
    storage = RecordingStorage(slow, log)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.writev, [memoryview(b"x" * 50)], 0)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(storage.sync)
    with trio.CancelScope() as scope:
        scope.cancel()
        await storage.write_zeroes(0, 10)
    cancelled = log.records[-1]
    assert cancelled.ended is None
    await storage.sync()
    assert cancelled in log.at_risk()
    assert cancelled not in log.durable()
    assert log.records[0] in log.durable()
    assert log.durable(log.records[-1].began) in ([], [log.records[0]])


async def test_slow_counts_its_pauses_and_can_cancel_at_each():
    for pause in range(1, 4):
        inner = MemoryStorage(bytes(100))
        scope = trio.CancelScope()
        storage = SlowStorage(inner)
        storage.on_pause = lambda number, at=pause, it=scope: it.cancel() if number == at else None
        with scope:
            await storage.writev([memoryview(b"x" * 100)], 0)
        assert scope.cancelled_caught
        assert inner.to_bytes().count(b"x") == (0, 50, 100)[pause - 1]
        assert storage.pauses == pause


async def test_strict_catches_unaligned_requests():
    storage = StrictStorage(MemoryStorage(65536))
    for call in (
        storage.pure_readv([memoryview(bytearray(100))], 0),
        storage.pure_writev([memoryview(bytearray(4096))], 5),
        storage.pure_write_zeroes(0, 5, allocated=False),
        storage.pure_discard(4096, 65536),
    ):
        with pytest.raises(AssertionError):
            await call
