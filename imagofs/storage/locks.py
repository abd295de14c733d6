"""qemu's locks on image files, so that neither program writes under the other.

A user of an image holds open-file-description locks, shared ones of a byte each: byte 100 + i says
"I use permission i", byte 200 + i says "I do not share permission i". Whoever wants in locks its
bytes first and then looks whether anybody else holds a contradicting one. If two look at the same
time, both see the other and both give up.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from enum import IntEnum

from ..errors import LockedError, StorageError, UnsupportedError

__all__ = ["ImageLock"]


class _Permission(IntEnum):
    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


_USED_BASE = 100
_UNSHARED_BASE = 200

_USED = {
    False: (_Permission.CONSISTENT_READ,),
    True: (_Permission.CONSISTENT_READ, _Permission.WRITE, _Permission.RESIZE),
}
_UNSHARED = (_Permission.WRITE, _Permission.RESIZE)  # in both cases

# struct flock: type, whence, start, length, pid; padded to its alignment.
_FLOCK = struct.Struct("@hhqqi0q")
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY})


class ImageLock:
    """The locks of one open file description.

    Args:
        fd: The image's descriptor, open for reading; the locks end when its description does.
        filename: Its name, for messages.
    """

    __slots__ = ("_fd", "_filename", "_held")

    def __init__(self, fd: int, filename: str | None) -> None:
        self._fd = fd
        self._filename = filename
        self._held: frozenset[int] = frozenset()

    def acquire(self, writable: bool) -> None:
        """Take the locks of a writer or of a reader, or change from one to the other.

        Does not wait. On an error the locks are as they were before.

        Raises:
            LockedError: Another process excludes this one.
            UnsupportedError: The file system has no such locks.
        """
        used = _USED[writable]
        wanted = frozenset(
            [_USED_BASE + permission for permission in used]
            + [_UNSHARED_BASE + permission for permission in _UNSHARED]
        )
        contradicting = [_UNSHARED_BASE + permission for permission in used]
        contradicting += [_USED_BASE + permission for permission in _UNSHARED]
        before = self._held
        try:
            self._take(wanted - before)
            for byte in contradicting:
                self._look(byte, writable)
        except BaseException:
            self._drop(self._held - before)
            raise
        self._drop(before - wanted)

    def release(self) -> None:
        """Give all locks back."""
        self._drop(self._held)

    def _take(self, offsets: frozenset[int]) -> None:
        for byte in sorted(offsets):
            try:
                self._fcntl(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
            except (BlockingIOError, PermissionError) as error:
                # Only an exclusive lock is in the way of a shared one. qemu takes none.
                raise self._locked(byte, "an exclusive lock") from error
            self._held |= {byte}

    def _drop(self, offsets: frozenset[int]) -> None:
        for byte in offsets:
            self._fcntl(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)
            self._held -= {byte}

    def _look(self, byte: int, writable: bool) -> None:
        """Refuse if another description holds `byte`."""
        answer = self._fcntl(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte)
        if answer[0] == fcntl.F_UNLCK:
            return
        if byte >= _UNSHARED_BASE:
            wish = "written to" if byte - _UNSHARED_BASE == _Permission.WRITE else "used"
            raise self._locked(byte, f"does not allow it to be {wish} by others", answer[4])
        raise self._locked(byte, "may write to it", answer[4])

    def _fcntl(self, command: int, kind: int, byte: int) -> tuple[int, ...]:
        request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
        try:
            return _FLOCK.unpack(fcntl.fcntl(self._fd, command, request))
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise UnsupportedError(
                    f"the file system has no open file description locks ({error.strerror})",
                    filename=self._filename,
                ) from error
            if isinstance(error, (BlockingIOError, PermissionError)):
                raise
            raise StorageError.of("lock", error, self._filename) from error

    def _locked(self, byte: int, what: str, pid: int = -1) -> LockedError:
        holder = _name_of(pid) if pid > 0 else _find_holder(self._fd, byte)
        return LockedError(
            f"is in use: {holder} {what}; stop that first (a mount with -o lock=off goes on, at "
            f"your own risk; so do qemu-img and qemu-io with -U)",
            filename=self._filename,
        )


def _find_holder(fd: int, byte: int) -> str:
    """Which process holds a lock on `byte` of the file, as far as this one may see that.

    The kernel does not tell who owns an open file description, since several processes may. The
    locks are listed where the description can be seen: in /proc/PID/fdinfo.
    """
    wanted = os.fstat(fd)
    me = os.getpid()
    for pid in _numbers("/proc"):
        for other_fd in _numbers(f"/proc/{pid}/fd"):
            if pid == me and other_fd == fd:
                continue
            try:
                with open(f"/proc/{pid}/fdinfo/{other_fd}", encoding="ascii") as lines:
                    if not any(_covers(line, wanted.st_ino, byte) for line in lines):
                        continue
                # Only now: a file on a file system that hangs (a stopped FUSE daemon's) would
                # keep whoever asks for its status.
                found = os.stat(f"/proc/{pid}/fd/{other_fd}")
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return "this process itself" if pid == me else _name_of(pid)
            except OSError:
                continue  # ended, closed, or not ours to look at
    return "another process"


def _numbers(folder: str) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(folder) if name.isdigit())
    except OSError:
        return []


def _covers(line: str, inode: int, byte: int) -> bool:
    """Whether a line of fdinfo tells of a lock on `byte` of a file with this inode number.

    For example: ``lock: 1: OFDLCK ADVISORY  READ -1 08:01:1835 100 101``
    """
    words = line.split()
    if len(words) != 9 or words[0] != "lock:" or words[2] not in ("OFDLCK", "POSIX"):
        return False
    if words[6].rpartition(":")[2] != str(inode):
        return False
    start, end = words[7], words[8]
    return int(start) <= byte and (end == "EOF" or byte <= int(end))


def _name_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return f"{file.read().strip()} (process {pid})"
    except OSError:
        return f"process {pid}"
