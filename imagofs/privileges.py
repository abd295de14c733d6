"""The helper that keeps the rights which the daemon gives up, and running as another user.

Once the disk is mounted the daemon may be another user, and it may not open files, run programs or
unmount any more (`confining.py`). A few things remain that need such rights, most at its end. So
before all that a child is forked that does these and nothing else: it is asked over a socket,
touches no mount but the daemon's own, and ends with it.

It also sees to it that the daemon's end is one. A thread may wait in the kernel for pages to be
written back to the daemon's own mount; if the daemon is killed then, that thread, which nothing can
end, keeps the connection open that nobody serves. So once the daemon's main thread has ended, and
the daemon has not, the helper severs the connection.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import stat
import struct
import threading
from contextlib import suppress

from .errors import StorageError
from .fuse import mounts, unmounting, utab

__all__ = ["Helper", "become", "keep_capabilities"]

_MESSAGE_BYTES = 1 << 16
_NAME = b"imagofs-helper"
#: CAP_SYS_ADMIN: to unmount; CAP_SYS_PTRACE: to see who uses a mount; CAP_DAC_OVERRIDE and
#: CAP_DAC_READ_SEARCH: in whatever folders.
_KEPT_CAPABILITIES = (21, 19, 1, 2)
_CAPABILITY_VERSION = 0x20080522
#: How often (seconds) the helper looks whether the daemon is still there. No signal and no pidfd
#: tells of a process that has a thread left.
_LOOK_SECONDS = 5.0


class Helper:
    """A child process with the rights of this moment. Any thread may ask it; each call waits.

    Make it before any thread exists.

    Args:
        remove: Path of a file or socket that the child may be told to remove; None for none.
    """

    def __init__(self, *, remove: str | None = None) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._child = os.fork()
        if self._child:
            theirs.close()
            return
        try:
            _serve(theirs, remove)
        finally:
            os._exit(0)

    def watch(self, device: str, *, remove: bool = False) -> None:
        """Say which mount is the daemon's, before anything else is asked. Only once.

        Args:
            device: "major:minor" of the mounted file system.
            remove: Once the daemon has ended, however it ends, the file is to be removed.
        """
        self._ask(b"W" if remove else b"w", device)

    def enter(self, point: str) -> None:
        """Let umount(8) know of the daemon's mount at `point`, which is served meanwhile.

        Raises:
            OSError: Another mount is there.
        """
        self._ask(b"e", point)

    def detach(self, point: str) -> None:
        """Unmount the daemon's mount at `point`, even while it is used.

        Raises:
            OSError: It failed, or another mount is there.
        """
        self._ask(b"d", point)

    def is_severed(self, point: str) -> bool:
        """Whether the daemon's mount at `point` has lost its daemon."""
        return bool(self._ask(b"s", point))

    def users(self, point: str) -> str:
        """As `mounts.users`; empty if that fails."""
        try:
            return self._ask(b"u", point)
        except OSError:
            return ""

    def close(self) -> None:
        """End the child, and wait for that."""
        self._socket.close()
        os.waitpid(self._child, 0)

    def _ask(self, what: bytes, argument: str) -> str:
        with self._lock:
            self._socket.send(what + os.fsencode(argument))
            answer = self._socket.recv(_MESSAGE_BYTES)
        number, _, text = answer.partition(b" ")
        if number != b"0":
            code = int(number or errno.EPIPE)
            raise OSError(code, os.fsdecode(text) or os.strerror(code), argument)
        return os.fsdecode(text)


def _serve(connection: socket.socket, remove: str | None) -> None:
    """In the child: keep nothing of the parent's but the socket, and serve until it is closed."""
    _leave_the_parent(connection.fileno())
    daemon = os.getppid()
    device, wanted = "", False
    interval: float | None = _LOOK_SECONDS
    while True:
        if not select.select([connection.fileno()], [], [], interval)[0]:
            if device and _has_died(daemon):
                _sever(device)
                interval = None
            continue
        request = connection.recv(_MESSAGE_BYTES)
        if not request:
            break
        argument = os.fsdecode(request[1:])
        text = ""
        try:
            if request[:1] in b"Ww":
                device = device or argument
                wanted = request[:1] == b"W"
            else:
                _check_mount(argument, device)
                text = _do(request[:1], argument)
            answer = b"0"
        except OSError as error:
            answer = b"%d" % (error.errno or errno.EPERM)
            text = error.strerror or ""
        connection.send((answer + b" " + os.fsencode(text))[:_MESSAGE_BYTES])
    if remove is not None and wanted:
        _remove(remove)


def _has_died(process: int) -> bool:
    """Whether a process has ended but for threads that cannot: a zombie that nobody can reap."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return False


def _sever(device: str) -> None:
    """End the connection of the daemon's mount, which nobody serves any more."""
    connection = device.rpartition(":")[2]
    try:
        # Also where the mount was detached and lives on while it is used.
        with open(f"/sys/fs/fuse/connections/{connection}/abort", "wb", buffering=0) as abort:
            abort.write(b"1")
    except OSError:
        for mount in mounts.mounts():
            if mount.device == device and mount.fstype == mounts.FSTYPE:
                with suppress(OSError):
                    unmounting.sever(mount.point)


def _leave_the_parent(kept: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Whoever waits for the end of the daemon's output, or for its terminal, waits for that alone.
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    os.setsid()
    os.chdir("/")
    try:
        with open("/proc/self/comm", "wb", buffering=0) as file:
            file.write(_NAME)
    except OSError:  # it is only a name
        pass
    if not os.geteuid():
        keep_capabilities(*_KEPT_CAPABILITIES)


def _check_mount(point: str, device: str) -> None:
    """Refuse what is not the daemon's mount."""
    mount = mounts.find_at(point)
    if mount is None or mount.device != device or mount.fstype != mounts.FSTYPE:
        raise OSError(errno.EINVAL, "not mounted by this daemon", point)


def _do(what: bytes, point: str) -> str:
    if what == b"d":
        unmounting.detach(point)
    elif what == b"e":
        mount = mounts.find_at(point)
        if mount is not None and not os.geteuid():
            utab.enter(mount)
    elif what == b"s":
        return "yes" if mounts.is_dead(point) else ""
    elif what == b"u":
        return mounts.users(point).names
    return ""


def _remove(path: str) -> None:
    try:
        kind = os.lstat(path).st_mode
        if stat.S_ISREG(kind) or stat.S_ISSOCK(kind):
            os.unlink(path)
    except OSError:  # nobody is left to be told
        pass


def keep_capabilities(*numbers: int) -> None:
    """Give up all capabilities but these, in this thread.

    Args:
        numbers: Which to keep, if they are there; below 32.

    Raises:
        OSError: The kernel does not do it.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    held = ctypes.create_string_buffer(24)  # twice effective, permitted, inheritable
    if libc.capget(header, held):
        raise OSError(ctypes.get_errno(), "capget failed")
    kept = struct.unpack("=6I", held)[1] & sum(1 << number for number in numbers)
    if libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset failed")


def become(user: int) -> None:
    """Run as this user from now on, in all threads, with the user's groups and no other rights.

    Args:
        user: The user ID. Without an entry in the user database the group has the same number.

    Raises:
        StorageError: Only root may do that.
    """
    import pwd

    try:
        entry = pwd.getpwuid(user)
        name, group = entry.pw_name, entry.pw_gid
    except KeyError:
        name, group = None, user
    try:
        if name is None:
            os.setgroups([])
        else:
            os.initgroups(name, group)
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
    except OSError as error:
        raise StorageError(
            f"cannot run as user {name or user}: {error.strerror}; setuid= is for root",
            error=error.errno or errno.EPERM,
        ) from error
