"""The way to pyfuse3: requests that the channel does not answer itself, and the replies to them.

pyfuse3's session reads and writes one end of a socket pair as if it were /dev/fuse. Two of its
replies are amended on their way to the kernel: INIT's and OPEN's.

What is under way is bounded, so that neither end of the socket ever fills: pyfuse3's end blocks,
and would block the whole process with it. The rest queues here.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable

import trio

from . import protocol

__all__ = ["Forwarder"]

#: Bytes that the replies that are under way may have, and what a small one counts.
_REPLY_BYTES = 96 << 10
_LEAST_REPLY = 1536
_SOCKET_BYTES = 1 << 20


class Forwarder:
    """Passes requests to pyfuse3 and its replies to the kernel.

    Args:
        session_fd: pyfuse3's session descriptor, which is replaced by an end of a socket pair.
        reply: Writes a reply to the kernel.
        fail: Answers a request (its unique) that cannot be passed on.
        amendments: What to change in INIT's reply.
        open_flags: FOPEN_* flags to add to OPEN's replies.
        negotiated: Called with the features once INIT was answered.
    """

    def __init__(
        self,
        session_fd: int,
        *,
        reply: Callable[[memoryview], None],
        fail: Callable[[int, OSError], None],
        amendments: protocol.Amendments,
        open_flags: int,
        negotiated: Callable[[int], None],
    ) -> None:
        self._reply = reply
        self._fail = fail
        self._amendments = amendments
        self._open_flags = open_flags
        self._negotiated = negotiated
        #: The requests that are under way, and the bytes that each reply may have.
        self.under_way: dict[int, int] = {}
        self._reply_bytes = 0
        self._amend: dict[int, int] = {}
        self._offered = 0
        self._queue: deque[tuple[bytes, int]] = deque()
        self._replied = trio.lowlevel.ParkingLot()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for end in (self._socket, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
            os.dup2(theirs.fileno(), session_fd, inheritable=False)
        self._socket.setblocking(False)

    def forward(self, opcode: int, unique: int, request: memoryview) -> None:
        """Pass a request on, or queue a copy of it. A plain function."""
        if opcode == protocol.INIT:
            self._offered = protocol.offered_features(request)
            self._amend[unique] = opcode
        elif opcode == protocol.OPEN and self._open_flags:
            self._amend[unique] = opcode
        if self._queue or not self._send(request, unique):
            self._queue.append((bytes(request), unique))

    def _send(self, request: memoryview | bytes, unique: int) -> bool:
        """Give pyfuse3 a request, if the replies that are under way leave room for its own."""
        room = max(_LEAST_REPLY, protocol.reply_limit(request))
        if self.under_way and self._reply_bytes + room > _REPLY_BYTES:
            return False
        try:
            self._socket.send(request)
        except OSError as error:
            # Larger than a message can be; the socket has room for what fits the bound.
            self._amend.pop(unique, None)
            self._fail(unique, error)
            return True
        self.under_way[unique] = room
        self._reply_bytes += room
        return True

    async def pass_replies(self) -> None:
        """Write pyfuse3's replies to the kernel, until the socket is shut."""
        buffer = memoryview(bytearray(_SOCKET_BYTES))
        while True:
            try:
                length = self._socket.recv_into(buffer)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                continue
            if not length:
                return
            self._pass_reply(buffer[:length])
            while self._queue and self._send(*self._queue[0]):
                self._queue.popleft()
            self._replied.unpark_all()

    def _pass_reply(self, reply: memoryview) -> None:
        _, _, unique = protocol.OUT_HEADER.unpack_from(reply)
        self._reply_bytes -= self.under_way.pop(unique, 0)
        features = 0
        match self._amend.pop(unique, None):
            case protocol.INIT:
                features = protocol.amend_init(reply, self._offered, self._amendments)
            case protocol.OPEN:
                protocol.amend_open(reply, self._open_flags)
        self._reply(reply)
        if features:
            self._negotiated(features)

    async def settle(self) -> None:
        """Wait until every request that was passed on is answered."""
        while self.under_way or self._queue:
            await self._replied.park()

    def shut(self) -> None:
        """Tell pyfuse3's loop that nothing more comes. Call `pyfuse3.terminate` first."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
