"""`imagofs -f` on a storage with moods: python -m tests.mount.special IMAGE POINT OPTIONS

Files beside the image steer it while it runs:

- IMAGE.hold: reads and writes of the first MiB, and syncs, wait until it is gone;
- IMAGE.fail: reads and writes of the second MiB fail with EIO, and so does every sync;
- IMAGE.bug: reads and writes of the third MiB raise what nobody foresaw.

The rest is as fast as ever. The image is raw, unless the options say another format.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

import imagofs.opening
from imagofs import daemon
from imagofs.access import FormatAccess
from imagofs.cli import report
from imagofs.cli.options import parse_options
from imagofs.errors import ImagofsError, StorageError
from imagofs.storage.base import Storage, StorageOpenOptions
from imagofs.storage.file import FileStorage
from tests.support.storages import WrappedStorage

MIB = 1 << 20


class MoodyStorage(WrappedStorage):
    """See the module's text."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self._hold, self._fail, self._bug = (
            Path(f"{inner.filename}.{mood}") for mood in ("hold", "fail", "bug")
        )

    def readv_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        return self.inner.readv_nowait(views, offset) if offset >= 3 * MIB else 0

    def writev_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        return self.inner.writev_nowait(views, offset) if offset >= 3 * MIB else 0

    async def _wait(self) -> None:
        while self._hold.exists():  # noqa: ASYNC110  another process removes it
            await trio.sleep(0.005)

    async def _mood(self, offset: int) -> None:
        if offset < MIB:
            await self._wait()
        if MIB <= offset < 2 * MIB and self._fail.exists():
            raise StorageError("a bad sector", error=errno.EIO, filename=self.filename)
        if 2 * MIB <= offset < 3 * MIB and self._bug.exists():
            raise LookupError("a bug")

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        await self._mood(offset)
        await super().pure_readv(views, offset)

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        await self._mood(offset)
        await super().pure_writev(views, offset)

    async def sync(self) -> None:
        await self._wait()
        if self._fail.exists():
            raise StorageError("cannot sync: a bad disk", error=errno.EIO, filename=self.filename)
        await super().sync()


def main() -> int:
    """Serve."""
    image, point, options = sys.argv[1:]
    open_image = imagofs.opening.open_image

    async def open_moody(path: str | os.PathLike[str] | Storage, **how: Any) -> FormatAccess:
        assert not isinstance(path, Storage)
        inner = FileStorage.open_now(path, StorageOpenOptions(writable=how["writable"]))
        return await open_image(MoodyStorage(inner), **{"format": "raw", **how})

    imagofs.opening.open_image = open_moody  # type: ignore[assignment]
    try:
        return daemon.mount(image, point, parse_options([options]), foreground=True)
    except ImagofsError as error:
        report(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
