"""Power cuts while an image is created, and while one is repaired.

Creation leaves no image (no valid header), the old image as it was, or a clean one that reads as
zeroes. Repair never makes an image worse, and another repair finishes it: the same is left, and the
guest sees the same, as if nothing had happened.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import trio

from imagofs import PermissiveImplicitOpenGate, open_image
from imagofs.creating import CreateOptions
from imagofs.errors import FormatError, ImagofsError
from imagofs.format.qcow2.check import Repair, check_image
from imagofs.format.qcow2.driver import Qcow2
from imagofs.storage.base import PreallocateMode
from imagofs.storage.memory import MemoryStorage
from tests.qcow2.damage import CASES, Bases, Image
from tests.support.qcow2_oracle import check, read_disk
from tests.support.storages import Log, RecordingStorage, replay
from tests.trust.crash import Broken, Cut, Tally, subsets

_PART = 32768
_SOUND = (0, 3)  # exit codes of a check: clean, or leaked clusters

CREATED: dict[str, CreateOptions] = {
    "small clusters": {"cluster_size": 512},
    "version 2": {"cluster_size": 512, "version": 2},
    "subclusters": {"cluster_size": 16384, "extended_l2": True},
    "one bit": {"cluster_size": 512, "refcount_bits": 1},
    "wide refcounts, tables": {
        "cluster_size": 512,
        "refcount_bits": 64,
        "preallocate": PreallocateMode.FORMAT_ALLOCATE,
    },
    "tables": {"cluster_size": 4096, "preallocate": PreallocateMode.FORMAT_ALLOCATE},
}


_OLD: CreateOptions = {"cluster_size": 1024}


def moments(log: Log) -> Iterator[Cut]:
    """As each sync begins, and the end."""
    times = [float(record.began) for record in log.records if record.kind == "sync"]
    for at in [*times, float("inf")]:
        yield Cut(at, log.durable(at), log.at_risk(at))


def crash_images(
    before: bytes, log: Log, rnd: random.Random, limit: int, tally: Tally
) -> Iterator[bytes]:
    """What power cuts may leave, about `limit` of each moment."""
    tally.changes += len(log.records)
    for cut in moments(log):
        tally.cuts += 1
        for chosen in subsets(cut, rnd, limit):
            tally.images += 1
            yield replay(before, sorted([*cut.durable, *chosen], key=lambda record: record.began))


def try_creation(seed: int, limit: int) -> Tally:
    """Create images of several kinds, in the place of nothing and of an old image."""
    rnd = random.Random(seed)
    tally = Tally()
    for name, options in CREATED.items():
        for old in (False, True):
            before = trio.run(_created, MemoryStorage(), _OLD) if old else b""
            recording = RecordingStorage(MemoryStorage(before))
            after = trio.run(_created, recording, options)
            try:
                _judge_created(after)
                for image in crash_images(before, recording.log, rnd, limit, tally):
                    if image[:4] == b"QFI\xfb" and image != before:
                        _judge_created(image)
            except Broken as error:
                place = "an old image" if old else "nothing"
                tally.broken.append(f"creating {name} in place of {place}, seed {seed}: {error}")
    return tally


async def _created(storage: MemoryStorage | RecordingStorage, options: CreateOptions) -> bytes:
    replacing: CreateOptions = {**options, "overwrite": True}
    await Qcow2.create(storage, 400 << 10, **replacing)
    memory = storage.inner if isinstance(storage, RecordingStorage) else storage
    assert isinstance(memory, MemoryStorage)
    return memory.to_bytes()


def _judge_created(image: bytes) -> None:
    verdict = check(image)
    if verdict.errors or verdict.leaked:
        raise Broken(f"neither no image nor a clean one: {verdict}")
    if any(read_disk(image)):
        raise Broken("it does not read as zeroes")


def try_repair(seed: int, folder: Path, limit: int, cases: int | None = None) -> Tally:
    """Repair damaged images.

    Args:
        seed: Of the choice.
        folder: For files.
        limit: Crash images for each moment.
        cases: So many kinds of damage, chosen at random; None: all.
    """
    rnd = random.Random(seed)
    bases = Bases(folder)
    chosen = list(CASES) if cases is None else rnd.sample(list(CASES), cases)
    tally = Tally()
    for name in chosen:
        image = Image(bases[CASES[name].kind].data)
        CASES[name].damage(image)
        modes: tuple[Repair, ...] = ("all", "leaks")
        for mode in modes:
            try:
                trio.run(_repair, bytes(image.data), mode, rnd, limit, tally)
            except Broken as error:
                tally.broken.append(f"repairing {mode}, {name}, seed {seed}: {error}")
    return tally


async def _repair(
    damaged: bytes, mode: Repair, rnd: random.Random, limit: int, tally: Tally
) -> None:
    recording = RecordingStorage(MemoryStorage(damaged))
    try:
        before = (await check_image(MemoryStorage(damaged))).exit_code
        result = await check_image(recording, repair=mode)
    except FormatError:
        return  # no image at all, which only repairing all of it mends
    if not recording.log.records:
        return
    assert isinstance(recording.inner, MemoryStorage)
    wanted = await _disk(recording.inner.to_bytes())
    for crashed in crash_images(damaged, recording.log, rnd, limit, tally):
        left = MemoryStorage(crashed)
        found = await check_image(left)
        if before in _SOUND and found.exit_code not in _SOUND:
            raise Broken(f"a sound image became corrupt: {found.findings[:3]}")
        again = await check_image(left, repair=mode)
        tally.by_imagofs += 1
        tally.leaking += found.exit_code == _SOUND[1]
        if (again.exit_code, again.leaks) != (result.exit_code, result.leaks):
            raise Broken(f"another repair ends with {again.exit_code}, not {result.exit_code}")
        if await _disk(left.to_bytes()) != wanted:
            raise Broken("the guest sees something else after another repair")


async def _disk(contents: bytes) -> list[bytes | None]:
    """What the guest sees, a part at a time; None for what cannot be read."""
    storage = MemoryStorage(contents, writable=False)
    parts: list[bytes | None] = []
    async with await open_image(
        storage, format="qcow2", gate=PermissiveImplicitOpenGate()
    ) as image:
        for offset in range(0, image.size(), _PART):
            part = bytearray(min(_PART, image.size() - offset))
            try:
                await image.read(part, offset)
            except ImagofsError:
                parts.append(None)
            else:
                parts.append(bytes(part))
    return parts
