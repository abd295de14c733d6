"""How `imagofs umount` finds the daemon of a mount, waits for it, and hears how it ended.

The daemon listens on a socket in the abstract namespace whose name is made of the mounted file
system's device number, which is in the table of mounts: the mount itself is never touched, root
needs no access to it, and nothing is left in the file system. Who connects is told nothing until
the end; then it gets one message: empty, or what was lost.

The kernel gives a mount's number to the next one as soon as it is free, and the daemon that had it
may not have noticed yet: it is stopped, or waits for a disk. So names go up: who finds the number's
name taken takes it with "/1" behind it, then "/2", and clients ask for the highest one.

Only root and the user who mounted are let in, and a client believes only a daemon of root's or of
that user.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import struct
import time
from contextlib import suppress
from typing import Self

__all__ = ["Connection", "ControlSocket", "EndedEarly"]

_CREDENTIALS = struct.Struct("=iII")  # process, user, group
_MESSAGE_BYTES = 4096
_ACCEPTS = 0x10000  # __SO_ACCEPTCON
_CONNECT_SECONDS = 5.0
_BIND_TRIES = 16


def _name(device: str, number: int) -> str:
    return f"\0imagofs/{device}/{number}" if number else f"\0imagofs/{device}"


def _taken(device: str) -> list[int]:
    """The numbers of the names of this device that somebody listens at, the highest one first."""
    try:
        with open("/proc/self/net/unix", "rb") as file:
            table = file.read()
    except OSError:
        return []
    # Reference counts, protocol, flags (this one: it listens), type, state, inode, name.
    line = rb"^\w+: \w+ \w+ (\w+) \w+ \w+ +\d+ @imagofs/%b(?:/(\d{1,9}))?$"
    found = re.findall(line % re.escape(device.encode()), table, re.MULTILINE)
    listening = (int(number or 0) for flags, number in found if int(flags, 16) & _ACCEPTS)
    return sorted(listening, reverse=True)


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user ID at the other end."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(data)
    return process, user


class ControlSocket:
    """The daemon's end.

    Args:
        device: "major:minor" of the mounted file system.

    Raises:
        OSError: The name is taken, or sockets are not allowed.
    """

    def __init__(self, device: str) -> None:
        self._clients: list[socket.socket] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._bind(device)
            self._socket.listen(64)
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def _bind(self, device: str) -> None:
        """Take a name above those that daemons of gone mounts of this number still have."""
        first = max(_taken(device), default=-1) + 1
        for number in range(first, first + _BIND_TRIES):
            try:
                self._socket.bind(_name(device, number))
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    def fileno(self) -> int:
        """The socket that listens, -1 once it does not any more."""
        return self._socket.fileno()

    async def serve(self) -> None:
        """Let clients in until `stop_listening`, so that those who gave up make room for others."""
        import trio

        with suppress(trio.ClosedResourceError):
            while True:
                await trio.lowlevel.wait_readable(self._socket)
                self._accept()

    def _accept(self) -> None:
        """Let in who waits, and forget who hung up."""
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                break
            if _peer(client)[1] in (0, os.geteuid()):
                self._clients.append(client)
            else:
                client.close()
        hung_up = select.poll()
        by_number = {client.fileno(): client for client in self._clients}
        for number in by_number:
            hung_up.register(number, 0)
        for number, _ in hung_up.poll(0):
            self._clients.remove(by_number[number])
            by_number[number].close()

    def stop_listening(self) -> None:
        """Give the name up: the mount is gone, and the next one may have its number.

        Who has connected before is told how it ends all the same. Called in trio's thread.
        """
        if self._socket.fileno() < 0:
            return
        import trio

        self._accept()
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()

    def end(self, lost: str) -> None:
        """Tell everybody how it ended, and close.

        Args:
            lost: What was lost; empty if nothing.
        """
        self.stop_listening()
        for client in self._clients:
            with client:
                try:
                    client.send(b"\0" + os.fsencode(lost)[: _MESSAGE_BYTES - 1])
                except OSError:  # it did not wait
                    pass
        self._clients.clear()


class EndedEarly(Exception):
    """The daemon ended without a word: it crashed or was killed."""


class _OtherUserError(ConnectionRefusedError):
    """Somebody listens who is neither root nor the mount's owner."""


class Connection:
    """A client's end. Use as a context manager.

    Args:
        device: "major:minor" of the mounted file system.
        owner: User ID of the user who mounted it.

    Raises:
        OSError: No daemon of that user, or of root, listens.
    """

    def __init__(self, device: str, owner: int) -> None:
        refused: OSError | None = None
        for number in _taken(device) or [0]:
            try:
                self._open(_name(device, number), owner)
                return
            except _OtherUserError as error:  # whoever: below it may be the daemon
                refused = error
        assert refused is not None
        raise refused

    def _open(self, name: str, owner: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(_CONNECT_SECONDS)
            self._connect(name)
            self._socket.settimeout(None)
            #: The daemon's process ID, as seen from here.
            self.process, user = _peer(self._socket)
            if user not in (0, owner):
                raise _OtherUserError(f"user {user} listens for the daemon of {owner}")
            self._process_fd = os.pidfd_open(self.process)
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, name: str) -> None:
        """Connect; many may ask at once, and wait for the daemon to let them in."""
        deadline = time.monotonic() + _CONNECT_SECONDS
        while True:
            try:
                self._socket.connect(name)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def ends_within(self, seconds: float) -> bool:
        """Wait for the daemon's end, but no longer; returns whether it has ended."""
        return bool(select.select([self._process_fd], [], [], seconds)[0])

    def wait(self) -> str:
        """Wait until the daemon has ended.

        Returns:
            What was lost; empty if nothing.

        Raises:
            EndedEarly: It did not say.
        """
        message = self._socket.recv(_MESSAGE_BYTES)
        select.select([self._process_fd], [], [])
        if not message:
            raise EndedEarly
        return os.fsdecode(message[1:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._process_fd)
        self._socket.close()
