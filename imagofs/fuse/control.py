"""How `imagofs umount` finds the daemon of a mount, waits for it, and hears how it ended.

The daemon listens on a socket in the abstract namespace whose name is made of the mounted file
system's device number, which is in the table of mounts: the mount itself is never touched, root
needs no access to it, and nothing is left in the file system. Who connects is told nothing until
the end; then it gets one message: empty, or what was lost.

Only root and the user who mounted are let in, and a client believes only a daemon of root's or of
that user.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from contextlib import suppress
from typing import Self

__all__ = ["Connection", "ControlSocket", "EndedEarly"]

_CREDENTIALS = struct.Struct("=iII")  # process, user, group
_MESSAGE_BYTES = 4096
_CONNECT_SECONDS = 5.0
_BIND_SECONDS = 2.0


def _name(device: str) -> str:
    return f"\0imagofs/{device}"


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
            self._bind(_name(device))
            self._socket.listen(64)
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def _bind(self, name: str) -> None:
        """Bind; a daemon whose mount had the same number may be about to give the name up."""
        deadline = time.monotonic() + _BIND_SECONDS
        while True:
            try:
                self._socket.bind(name)
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise
            time.sleep(0.005)

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


class Connection:
    """A client's end. Use as a context manager.

    Args:
        device: "major:minor" of the mounted file system.
        owner: User ID of the user who mounted it.

    Raises:
        OSError: No daemon of that user, or of root, listens.
    """

    def __init__(self, device: str, owner: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(_CONNECT_SECONDS)
            self._connect(_name(device))
            self._socket.settimeout(None)
            #: The daemon's process ID, as seen from here.
            self.process, user = _peer(self._socket)
            if user not in (0, owner):
                raise ConnectionRefusedError(f"user {user} listens for the daemon of {owner}")
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
