"""Changes that are cancelled, or whose storage fails, over all writable formats."""

import pytest
import trio

from imagofs import ImagofsError, StorageError
from tests.format.formats import disk, read, reopened
from tests.support.storages import FaultyStorage, SlowStorage, StrictStorage

#: One of each way to write. Sectors of an odd window would be no sectors of its storage.
NAMES = """raw qcow2 qcow2-small qcow2-large qcow2-v2-backing qcow2-extended-backing qcow2-data
    qcow2-data-raw qcow2-deep qcow2-compressed vmdk-flat"""


@pytest.fixture(params=NAMES.split())
def kind(request):
    return disk(request.param)


OPERATIONS = {
    "write": lambda access: access.write(b"n" * 100_000, 30_000),
    "small write": lambda access: access.write(b"n" * 700, 30_000),
    "zeroes": lambda access: access.write_zeroes(30_000, 100_000),
    "allocated zeroes": lambda access: access.write_zeroes(30_000, 100_000, allocate=True),
    "discard to zero": lambda access: access.discard_to_zero(30_000, 100_000),
    "data mapping": lambda access: access.ensure_data_mapping(30_000, 100_000),
    "flush": lambda access: access.flush(),
    "sync": lambda access: access.sync(),
}


def sectored(storage):
    """A storage that writes whole sectors, as a disk does."""
    return StrictStorage(storage, request=512, memory=1, zero=512, discard=4096)


def old_or_new(kind, now, operation, before):
    """See that each sector has its old or its new contents."""
    assert len(now) == len(before)
    new = bytearray(before)
    if operation == "write":
        new[30_000:130_000] = b"n" * 100_000
    elif operation == "small write":
        new[30_000:30_700] = b"n" * 700
    elif operation not in ("flush", "sync", "data mapping"):
        new[30_000:130_000] = bytes(100_000)
    first, last = 29_696, 130_048
    assert now[:first] == before[:first]
    assert now[last:] == before[last:]
    for start in range(first, last, 512):
        part = now[start : start + 512]
        assert part in (before[start : start + 512], new[start : start + 512]), start


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_cancelled_at_any_await(kind, operation):
    """No lock stays, nothing dirty is lost, the image can go on being used."""
    before = bytearray(kind.contents)
    before[200_000:200_100] = b"d" * 100  # what is dirty when the operation begins
    for nth in (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 28):
        slow: list[SlowStorage] = []

        def wrap(storage, slow=slow):
            slow.append(SlowStorage(sectored(storage)))
            return slow[-1]

        opened = await kind.open(writable=True, wrap=wrap)
        access = opened.access
        await access.write(b"d" * 100, 200_000)
        scope = trio.CancelScope()
        count = 0

        def cancel(_, nth=nth, scope=scope):
            nonlocal count
            count += 1
            if count >= nth:
                scope.cancel()

        for storage in slow:
            storage.on_pause = cancel
        with scope:
            await OPERATIONS[operation](access)
        for storage in slow:
            storage.on_pause = None
        with trio.fail_after(10):
            old_or_new(kind, await read(access), operation, before)
            await access.write(b"after" * 200, 29_900)
            await access.write_zeroes(100_000, 40_000)
            await access.write(b"z", 130_000)
            model = await read(access)
            assert model[29_900:30_900] == b"after" * 200
            await access.close()
        assert await reopened(kind, opened) == model
        if nth in (1, 4, 13):
            kind.check(opened.files())
        if not scope.cancelled_caught:
            break


@pytest.mark.parametrize("call", ["read", "write", "sync"])
@pytest.mark.parametrize("operation", ["write", "zeroes", "discard to zero", "data mapping"])
async def test_a_failing_storage(kind, operation, call):
    """A failed change leaves old or new bytes; what was not a sync can be tried again."""
    for nth in range(1, 4):
        faulty: list[FaultyStorage] = []

        def wrap(storage, faulty=faulty):
            faulty.append(FaultyStorage(sectored(storage), partial=True))
            return faulty[-1]

        opened = await kind.open(writable=True, wrap=wrap)
        access = opened.access
        for storage in faulty:
            storage.calls.clear()
            storage.kind, storage.nth = call, nth
        failed = False
        try:
            await OPERATIONS[operation](access)
        except StorageError:
            failed = True
        for storage in faulty:
            storage.kind = None
        old_or_new(kind, await read(access), operation, kind.contents)
        if call != "sync":
            await access.write(b"again", 30_000)
            model = await read(access)
            await access.close()
            assert await reopened(kind, opened) == model
            kind.check(opened.files())
        else:
            try:
                await access.close()
            except ImagofsError:
                assert failed
        if not failed:
            break
