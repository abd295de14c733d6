"""Running as another user, with one process left that may still unmount.

Whoever gave up root's rights cannot take a mount away. So before that a child is forked that does
nothing else: it gets the paths of mountpoints over a socket, and ends when the daemon does.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading

from .errors import StorageError
from .fuse import mounts

__all__ = ["Detacher", "become"]

_PATH_BYTES = 1 << 16


class Detacher:
    """A child process with the rights of this moment, which unmounts on request.

    Make it before any thread exists.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._child = os.fork()
        if self._child:
            theirs.close()
            return
        try:
            _serve(theirs)
        finally:
            os._exit(0)

    def detach(self, point: str) -> None:
        """Unmount what is mounted at `point`, even while it is used. Waits; any thread may call.

        Raises:
            OSError: It failed.
        """
        with self._lock:
            self._socket.send(os.fsencode(point))
            answer = self._socket.recv(16)
        number = int(answer) if answer else errno.EPERM
        if number:
            raise OSError(number, os.strerror(number), point)

    def close(self) -> None:
        """End the child."""
        self._socket.close()
        os.waitpid(self._child, 0)


def _serve(connection: socket.socket) -> None:
    """In the child: keep nothing of the parent's but the socket, and serve until it is closed."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    kept = connection.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    while path := connection.recv(_PATH_BYTES):
        try:
            mounts.detach(os.fsdecode(path))
            answer = 0
        except OSError as error:
            answer = error.errno or errno.EPERM
        connection.send(b"%d" % answer)


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
