"""Helpers of the tests of FileStorage."""

from __future__ import annotations

import os

from imagofs.storage import Storage, StorageOpenOptions

WRITABLE = StorageOpenOptions(writable=True)


def views(*buffers: bytes | bytearray) -> list[memoryview]:
    """A vector of the buffers."""
    return [memoryview(buffer) for buffer in buffers]


async def read(storage: Storage, offset: int, length: int) -> bytes:
    """The bytes of a range, read into dirty memory."""
    buffer = bytearray(b"\xee" * length)
    await storage.readv(views(buffer), offset)
    return bytes(buffer)


def open_descriptors() -> list[int]:
    """Descriptors of this process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:  # the one that listed them
            continue
        found.append(int(name))
    return found
