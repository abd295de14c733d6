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
        self._busy: dict[int, tuple[int, int]] = {}
        #: Writes that no sync covers yet, by number in the order in which they began.
        self._unsynced: dict[int, tuple[int, bytes]] = {}
        #: Those of them that ended.
        self._ended: set[int] = set()
        #: The contents that a sync covers.
        self.synced = bytearray(contents)
        #: How many writes began, and how many syncs succeeded.
        self.begun = self.syncs = 0

    def begin(self, offset: int, data: bytes) -> int:
        """Wait until no write in flight overlaps; enter this one, and return its number."""
        end = offset + len(data)
        with self._lock:
            while any(start < end and offset < stop for start, stop in self._busy.values()):
                self._lock.wait()
            number = self.begun
            self.begun += 1
            self._busy[number] = (offset, end)
            self._unsynced[number] = (offset, data)
            self.contents[offset:end] = data
        return number

    def fail(self, number: int) -> None:
        """A write failed: nobody knows how much of it is there."""
        with self._lock:
            del self._busy[number]
            self._lock.notify_all()

    def end(self, number: int) -> None:
        """A write returned."""
        with self._lock:
            del self._busy[number]
            self._ended.add(number)
            self._lock.notify_all()

    def sync(self, file: int) -> None:
        """fsync, and note what it covered."""
        with self._lock:
            covered = sorted(self._ended)
        os.fsync(file)
        with self._lock:
            self.syncs += 1
            for number in covered:
                if number in self._unsynced:  # no other sync was faster
                    offset, data = self._unsynced.pop(number)
                    self.synced[offset : offset + len(data)] = data
            self._ended.difference_update(covered)

    def doubt(self) -> None:
        """A sync failed whose lost writes nobody tries again: no later sync covers them."""
        with self._lock:
            self._ended.clear()

    def check_after_crash(self, found: bytes) -> None:
        """Each byte is what a sync covered, or what a later write put there."""
        assert len(found) == len(self.synced)
        candidates: dict[int, list[tuple[int, bytes]]] = {}
        for offset, data in self._unsynced.values():
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
                begun = mirror.begin(offset, data)
                try:
                    _write_all(fd, data, offset)
                except BaseException:
                    mirror.fail(begun)
                    raise
                mirror.end(begun)
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
