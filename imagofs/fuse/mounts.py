"""The kernel's table of mounts, and who uses one.

Nothing here touches a mountpoint itself, so that nothing waits for a daemon that does not answer;
only `is_dead` asks one, in a process of its own and with a time limit.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from typing import Final, NamedTuple

from ..arguments import path_of

__all__ = [
    "FSTYPE",
    "Mount",
    "Users",
    "exit_code_within",
    "find_at",
    "find_device",
    "is_dead",
    "keep_table_open",
    "mounts",
    "other_namespaces",
    "real_path",
    "unescape",
    "users",
]

#: The type that mount(8) shows for a mount of ours.
FSTYPE: Final = "fuse.imagofs"

_ESCAPE = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo.

    Attributes:
        device: "major:minor", unique among the file systems of the kernel.
        point: Where it is mounted, as an absolute path.
        fstype: Its type.
        source: What is mounted.
        owner: User ID of the user who mounted it (FUSE only), -1 where there is none.
    """

    device: str
    point: str
    fstype: str
    source: str
    owner: int


class Users(NamedTuple):
    """Who uses a mount.

    Attributes:
        names: A list for a message ("/dev/loop0, process 17"); empty if nobody is seen.
        lasting: Whether there are others than loop devices that are detached with their last user.
    """

    names: str
    lasting: bool


_TABLE: Final = "/proc/self/mountinfo"
_CHUNK_BYTES = 1 << 16
_kept_table: int | None = None


def mounts() -> list[Mount]:
    """Every mount that this process sees; what is mounted over another comes after it."""
    if _kept_table is None:
        with open(_TABLE, "rb") as table:
            return [_parse(line) for line in table]
    text = b""
    while chunk := os.pread(_kept_table, _CHUNK_BYTES, len(text)):
        text += chunk
    return [_parse(line) for line in text.split(b"\n") if line]


def keep_table_open() -> None:
    """For a process that will not be allowed to open files: `mounts` then needs none."""
    global _kept_table
    if _kept_table is None:
        _kept_table = os.open(_TABLE, os.O_RDONLY | os.O_CLOEXEC)


def _parse(line: bytes) -> Mount:
    fields = line.rstrip(b"\n").split(b" ")
    fstype, source, options = fields[fields.index(b"-") + 1 :][:3]
    owner = re.search(rb"(?:^|,)user_id=(\d+)", options)
    return Mount(
        fields[2].decode(),
        unescape(fields[4]),
        unescape(fstype),
        unescape(source),
        int(owner[1]) if owner else -1,
    )


def unescape(field: bytes) -> str:
    """A field of such a table: blanks and the like are written as three octal digits in it."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def find_at(point: str) -> Mount | None:
    """The mount that is seen at `point` (a real path), None if nothing is mounted there."""
    return next((mount for mount in reversed(mounts()) if mount.point == point), None)


def find_device(device: str) -> list[Mount]:
    """Every place where the file system `device` is mounted, the last one first."""
    return [mount for mount in reversed(mounts()) if mount.device == device]


def real_path(point: str) -> str:
    """The absolute path of a mountpoint without symbolic links.

    The last component is looked at only if nothing is mounted there.

    Raises:
        StorageError: `point` is empty.
    """
    head, tail = os.path.split(os.path.abspath(path_of(point)))
    path = os.path.join(os.path.realpath(head), tail)
    if find_at(path) is None:
        path = os.path.realpath(path)
    return path


def is_dead(point: str, *, seconds: float = 5.0) -> bool:
    """Whether the mount at `point` has lost its daemon ("Transport endpoint is not connected").

    stat(2) does not tell: it may be answered from what the kernel remembers.

    Returns:
        False for a mount that does not answer in time: somebody may still be working on it.
    """
    child = os.fork()
    if not child:
        try:
            os.statvfs(point)
            code = 0
        except OSError as error:
            code = 1 if error.errno in (errno.ENOTCONN, errno.ECONNABORTED) else 0
        os._exit(code)
    return exit_code_within(seconds, child) == 1


def exit_code_within(seconds: float, child: int) -> int | None:
    """The exit code of a child process; None if it took longer, and was killed."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)  # it may take long to end even so
            return None
        time.sleep(0.002)


def users(point: str) -> Users:
    """Loop devices and processes that use what is mounted at `point`, as far as can be seen."""
    found = []
    lasting = False
    for device in sorted(os.listdir("/sys/block")):
        folder = f"/sys/block/{device}/loop"
        try:
            with open(f"{folder}/backing_file", "rb") as file:
                backing = os.fsdecode(file.read().rstrip(b"\n"))
            with open(f"{folder}/autoclear", "rb") as file:
                going = file.read().strip() == b"1"
        except OSError:  # no loop device, or none that is in use
            continue
        if _is_within(backing, point):
            found.append(f"/dev/{device}")
            lasting |= not going
    for process in filter(str.isdigit, os.listdir("/proc")):
        if _process_uses(process, point):
            found.append(f"process {process}")
            lasting = True
    return Users(_listed(found), lasting)


def other_namespaces(device: str) -> str:
    """In whose mount namespaces, other than this process's, a file system is mounted.

    Args:
        device: "major:minor" of the file system.

    Returns:
        A process of each, as a list for a message ("process 17"), as far as can be seen.
    """
    seen = {os.stat("/proc/self/ns/mnt").st_ino}
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            namespace = os.stat(f"/proc/{process}/ns/mnt").st_ino
            if namespace in seen:
                continue
            seen.add(namespace)
            with open(f"/proc/{process}/mountinfo", "rb") as table:
                if any(_parse(line).device == device for line in table):
                    found.append(f"process {process}")
        except OSError:  # another user's, or gone
            continue
    return _listed(found)


def _listed(found: list[str]) -> str:
    return ", ".join(found[:5]) + (" ..." if len(found) > 5 else "")


def _process_uses(process: str, point: str) -> bool:
    folder = f"/proc/{process}"
    try:
        links = [f"{folder}/cwd", *(f"{folder}/fd/{fd}" for fd in os.listdir(f"{folder}/fd"))]
    except OSError:  # another user's, or gone
        return False
    for link in links:
        try:
            if _is_within(os.readlink(link), point):
                return True
        except OSError:
            continue
    return False


def _is_within(path: str, point: str) -> bool:
    return path == point or path.startswith(f"{point}/")
