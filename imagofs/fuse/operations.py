"""pyfuse3's handlers: the names and attributes of a mount, and its data where there is no channel.

Two shapes. On a directory, the root is a directory with one file in it; on a regular file, the
root is that file.

Only `FUSEError` leaves a handler: anything else would end the mount.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import select
import stat
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Final, NoReturn, ParamSpec, TypeVar, cast

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from .disk import Disk
from .errors import FailureLog

__all__ = ["Operations", "Shown"]

log = logging.getLogger(__name__)

ROOT: Final = int(pyfuse3.ROOT_INODE)
FILE: Final = 2
_DIRECTORY_HANDLE = 0

#: The one file changes only through this mount, and its names never do. What moves by itself are
#: the allocated blocks and the time of the last change, of a writable mount.
_FOREVER = 86400.0
_WRITABLE_SECONDS = 1.0

_FORMAT = b"user.imagofs.format"
_CHAIN = b"user.imagofs.chain"
_STATS = b"user.imagofs.stats"

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Shown:
    """How the disk's file appears.

    Attributes:
        name: Its name in a directory mount; None: the mountpoint itself is the file.
        uid: Its owner.
        gid: Its group.
        mode: Its permission bits.
        direct_io: Whether reads and writes bypass the kernel's page cache.
    """

    name: bytes | None
    uid: int
    gid: int
    mode: int
    direct_io: bool = False


def _answered(
    handler: Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]:
    """Let nothing but FUSEError out of a handler."""

    async def answered(self: Operations, /, *arguments: P.args, **named: P.kwargs) -> R:
        try:
            return await handler(self, *arguments, **named)
        except FUSEError:
            raise
        except Exception as error:
            action = f"answer {handler.__name__}"
            raise FUSEError(self.failures.answer(error, action)) from None

    functools.update_wrapper(answered, handler)
    return answered


class Operations(pyfuse3.Operations):
    """The handlers of one mount.

    Args:
        disk: The file that is shown.
        shown: How it appears.
        on_init: Called when the kernel has asked for the session to begin.
        statistics: Gives what the extended attribute `user.imagofs.stats` shows.
    """

    def __init__(
        self,
        disk: Disk,
        shown: Shown,
        on_init: Callable[[], None],
        statistics: Callable[[], dict[str, Any]],
    ) -> None:
        super().__init__()
        self.disk = disk
        self.shown = shown
        self.failures = FailureLog(log)
        self.file_inode = ROOT if shown.name is None else FILE
        self.enable_writeback_cache = disk.writeback
        self._on_init = on_init
        self._statistics = statistics
        # Times that a client set, and the image's own time when it did: they hold until the image
        # changes the next time.
        self._times: tuple[int, int, int] | None = None

    def init(self) -> None:
        """Called by pyfuse3 while it answers INIT."""
        self._on_init()

    # --- names ----------------------------------------------------------------------------------

    @_answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if name in (b".", b".."):
            return self._attributes(parent_inode if name == b"." else ROOT)
        if parent_inode == ROOT and self.shown.name is not None and name == self.shown.name:
            return self._attributes(FILE)
        raise FUSEError(errno.ENOENT)

    @_answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        if inode == self.file_inode:
            raise FUSEError(errno.ENOTDIR)
        return _DIRECTORY_HANDLE

    @_answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        assert self.shown.name is not None
        entries = [(b".", ROOT), (b"..", ROOT), (self.shown.name, FILE)]
        for number, (name, inode) in enumerate(entries[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self._attributes(inode), number):
                break

    @_answered
    async def releasedir(self, fh: int) -> None:
        pass

    @_answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The two inodes live as long as the mount."""

    # --- attributes -----------------------------------------------------------------------------

    @_answered
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(inode)

    @_answered
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        self.disk.check_writable()
        if inode != self.file_inode or (
            fields.update_mode or fields.update_uid or fields.update_gid
        ):
            # They are mount options; a change would be forgotten at the end of the mount.
            raise FUSEError(errno.EPERM)
        if fields.update_size:
            await self.disk.truncate(attr.st_size, by_name=fh is None)
        if fields.update_atime or fields.update_mtime:
            now = self._attributes(inode)
            atime = attr.st_atime_ns if fields.update_atime else now.st_atime_ns
            mtime = attr.st_mtime_ns if fields.update_mtime else now.st_mtime_ns
            self._times = (atime, mtime, self.disk.image_status().mtime_ns)
        return self._attributes(inode)

    def _attributes(self, inode: int) -> EntryAttributes:
        shown = self.shown
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.st_uid, entry.st_gid = shown.uid, shown.gid
        entry.entry_timeout = _FOREVER
        entry.attr_timeout = _WRITABLE_SECONDS if self.disk.writable else _FOREVER
        image = self.disk.image_status()
        entry.st_atime_ns, entry.st_mtime_ns = image.atime_ns, image.mtime_ns
        entry.st_ctime_ns = image.ctime_ns
        if inode == self.file_inode:
            entry.st_mode = stat.S_IFREG | shown.mode
            entry.st_size = self.disk.size
            entry.st_blocks = self.disk.blocks()
            if self._times is not None and self._times[2] == image.mtime_ns:
                entry.st_atime_ns, entry.st_mtime_ns, _ = self._times
        elif inode == ROOT:
            entry.st_mode = stat.S_IFDIR | 0o555
            entry.st_nlink = 2
        else:
            raise FUSEError(errno.ENOENT)
        return entry

    @_answered
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return True  # the kernel checks (default_permissions)

    @_answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        data = StatvfsData()
        # A loop device takes f_bsize as its discard granularity.
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = -(-self.disk.size // 4096)
        data.f_files = 1 if self.shown.name is None else 2
        data.f_namemax = 255
        return data

    # --- extended attributes ----------------------------------------------------------------------

    @_answered
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return [_FORMAT, _CHAIN, _STATS]

    @_answered
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if name == _FORMAT:
            return self.disk.access.format_name.encode()
        if name == _CHAIN:
            layers = [
                {
                    "filename": layer.filename,
                    "format": layer.format_name,
                    "virtual-size": layer.size(),
                }
                for layer in self.disk.access.layers()
            ]
            return json.dumps(layers).encode()
        if name == _STATS:
            return json.dumps(self._statistics()).encode()
        raise FUSEError(pyfuse3.ENOATTR)

    @_answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.EOPNOTSUPP if self.disk.writable else errno.EROFS)

    @_answered
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.EOPNOTSUPP if self.disk.writable else errno.EROFS)

    # --- the file ---------------------------------------------------------------------------------

    @_answered
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if inode != self.file_inode:
            raise FUSEError(errno.EISDIR)
        handle = self.disk.open(flags)
        return FileInfo(fh=handle, direct_io=self.shown.direct_io, keep_cache=True)

    @_answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        buffer = bytearray(self.disk.clip(off, size))
        await self.disk.read(memoryview(buffer), off)
        return cast(bytes, buffer)  # pyfuse3 takes whatever has a buffer

    @_answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        # pyfuse3 does not say who writes: under writeback it is the kernel, mostly, for its pages.
        return await self.disk.write(memoryview(buf), off, whole=self.disk.writeback)

    @_answered
    async def flush(self, fh: int) -> None:
        await self.disk.flush(fh)

    @_answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.disk.sync()

    @_answered
    async def release(self, fh: int) -> None:
        # A loop device that is detached sends nothing else, and what an mmap changed after close(2)
        # comes after FLUSH.
        try:
            await self.disk.flush(fh)
        finally:
            self.disk.release(fh)

    async def poll(self, inode: int, fh: int, poll_handle: Any, ctx: RequestContext) -> int:
        """A disk is always ready."""
        return select.POLLIN | select.POLLOUT

    # --- what a mount of one file does not have --------------------------------------------------

    def _refuse(self) -> NoReturn:
        raise FUSEError(errno.EPERM if self.disk.writable else errno.EROFS)

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """There are no symbolic links."""
        raise FUSEError(errno.EINVAL)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> NoReturn:
        """Refused: as everything below that would make, move or remove a name."""
        self._refuse()

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> NoReturn:
        """Refused."""
        self._refuse()

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> NoReturn:
        """Refused."""
        self._refuse()

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> NoReturn:
        """Refused."""
        self._refuse()

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> NoReturn:
        """Refused."""
        self._refuse()

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> NoReturn:
        """Refused."""
        self._refuse()

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> NoReturn:
        """Refused."""
        self._refuse()

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> NoReturn:
        """Refused."""
        self._refuse()
