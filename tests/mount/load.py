"""Random writes through a mount, mirrored, with what an fsync covered kept apart."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

__all__ = ["SECTOR", "Mirror", "run_writers"]

SECTOR = 512


class Mirror:
    """The disk's contents as they must be, and what may be there after a crash.

    A write is *begun* before it is issued and *ended* when the call returned. A sync covers the
    writes that ended before it began.
    """

    def __init__(self, contents: bytes) -> None:
        self.contents = bytearray(contents)
        self._lock = threading.Condition()
        self._busy: list[tuple[int, int]] = []
        #: Writes that no sync covers yet: (offset, data, ended).
        self._unsynced: list[tuple[int, bytes, bool]] = []
        #: The contents that a sync covers.
        self.synced = bytearray(contents)
        #: How many writes began, and how many syncs succeeded.
        self.begun = self.syncs = 0

    def begin(self, offset: int, data: bytes) -> None:
        """Wait until no write in flight overlaps; enter this one."""
        end = offset + len(data)
        with self._lock:
            while any(start < end and offset < stop for start, stop in self._busy):
                self._lock.wait()
            self._busy.append((offset, end))
            self.contents[offset:end] = data
            self._unsynced.append((offset, data, False))
            self.begun += 1

    def fail(self, offset: int, data: bytes) -> None:
        """A write failed: nobody knows how much of it is there."""
        with self._lock:
            self._busy.remove((offset, offset + len(data)))
            self._lock.notify_all()

    def end(self, offset: int, data: bytes) -> None:
        """A write returned."""
        with self._lock:
            self._busy.remove((offset, offset + len(data)))
            index = next(number for number, entry in enumerate(self._unsynced) if entry[1] is data)
            self._unsynced[index] = (offset, data, True)
            self._lock.notify_all()

    def sync(self, file: int) -> None:
        """fsync, and note what it covered."""
        with self._lock:
            covered = [entry for entry in self._unsynced if entry[2]]
        os.fsync(file)
        with self._lock:
            self.syncs += 1
            for entry in covered:
                if entry in self._unsynced:
                    self.synced[entry[0] : entry[0] + len(entry[1])] = entry[1]
                    self._unsynced.remove(entry)

    def doubt(self) -> None:
        """A sync failed whose lost writes nobody tries again: no later sync covers them."""
        with self._lock:
            self._unsynced = [(offset, data, False) for offset, data, _ in self._unsynced]

    def check_after_crash(self, found: bytes) -> None:
        """Each byte is what a sync covered, or what a later write put there."""
        assert len(found) == len(self.synced)
        candidates: dict[int, list[tuple[int, bytes]]] = {}
        for offset, data, _ in self._unsynced:
            for sector in range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)):
                candidates.setdefault(sector, []).append((offset, data))
        for sector in range(len(found) // SECTOR):
            at = sector * SECTOR
            there = found[at : at + SECTOR]
            if there == self.synced[at : at + SECTOR]:
                continue
            writes = candidates.get(sector, [])
            if any(data[at - offset : at - offset + SECTOR] == there for offset, data in writes):
                continue
            # A write may begin or end within the sector.
            for position in range(at, at + SECTOR):
                byte = found[position]
                assert byte == self.synced[position] or any(
                    offset <= position < offset + len(data) and data[position - offset] == byte
                    for offset, data in writes
                ), f"byte {position} is {byte}, which nobody wrote there"


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def run_writers(
    file: Path,
    mirror: Mirror,
    *,
    writes: int,
    seed: int,
    threads: int = 8,
    largest: int = 1 << 20,
    sync_every: int = 0,
) -> None:
    """`writes` random writes of 512 bytes to `largest`, unaligned, `threads` in flight.

    Sizes are spread evenly over their logarithm. Raises the first writer's OSError once all ended.
    """
    counter = iter(range(writes))
    lock = threading.Lock()
    errors: list[BaseException] = []
    size = len(mirror.contents)
    pool = random.Random(seed).randbytes(2 * largest)

    def work(number: int) -> None:
        rnd = random.Random(seed * 1000 + number)
        fd = -1
        try:
            fd = os.open(file, os.O_RDWR)
            while not errors:
                with lock:
                    turn = next(counter, None)
                if turn is None:
                    return
                length = int(512 * (largest / 512) ** rnd.random())
                offset = rnd.randrange(size - length + 1)
                start = rnd.randrange(len(pool) - length)
                data = pool[start : start + length]
                mirror.begin(offset, data)
                try:
                    _write_all(fd, data, offset)
                except BaseException:
                    mirror.fail(offset, data)
                    raise
                mirror.end(offset, data)
                if sync_every and turn % sync_every == sync_every - 1:
                    mirror.sync(fd)
        except BaseException as exc:
            errors.append(exc)
        finally:
            try:
                if fd >= 0:
                    os.close(fd)
            except OSError as exc:
                errors.append(exc)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
