"""Stand-ins to test the channel alone: for the kernel, and for the second thread."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from imagofs.fuse import protocol
from imagofs.fuse.channel import Channel
from imagofs.fuse.large_replies import LargeReplies

KIB = 1 << 10
MIB = 1 << 20


def fail(error: OSError, _header: bytes = b"") -> None:
    raise AssertionError from error


class Second:
    """In the second thread's place: what is given waits until `work` or `take_back`."""

    def __init__(self) -> None:
        self.given: list[Callable[[], None]] = []
        self.takes_any = True
        self.times = 0  # that something was given

    @property
    def is_busy(self) -> bool:
        return bool(self.given)

    def give(self, work: Callable[[], None]) -> bool:
        if self.given or not self.takes_any:
            return False
        self.given.append(work)
        self.times += 1
        return True

    def work(self) -> bool:
        if not self.given:
            return False
        self.given.pop()()
        return True

    take_back = settle = work


class Kernel:
    """In the kernel's place: sends requests to a channel of its own, and takes the replies."""

    LENGTH = 128 * KIB

    def __init__(self, file: int, *, writable: bool, wakefulness: Any = None) -> None:
        self._socket, self._session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
        self._file = file
        #: The replies, and between them what was done to the image.
        self.seen: list[bytes] = []
        self.second = Second()
        #: What is done with a WRITE that is handed over; returns whether it is written.
        self.write: Callable[[memoryview, int], bool] = self._write_nowait
        access = SimpleNamespace(
            lend_nowait=lambda *_: None,
            cached_ranges=lambda *_: [(file, 0, 1)],  # or the socket would be full
            read_nowait=None,
            write_nowait=lambda view, offset: self.write(view, offset),
            prepare_write_nowait=lambda view, offset: partial(self.write, view, offset),
        )
        disk: Any = SimpleNamespace(access=access, size=MIB, writable=writable, launder=None)
        self.channel = Channel(
            self._session.fileno(),
            disk,
            inode=2,
            amendments=protocol.Amendments(0, 0, 16),
            direct_io=False,
            open_flags=0,
            wakefulness=wakefulness,
            negotiated=lambda _: None,
        )
        second: Any = self.second
        self.channel._large = LargeReplies(self.channel._fd, second, fail)
        self.channel._large_writes._second = second

    def _write_nowait(self, view: memoryview, offset: int) -> bool:
        self.receive()
        self.seen.append(b"changed")
        return True

    def send(self, unique: int, opcode: int, length: int = LENGTH) -> None:
        head = protocol.DATA_IN.pack(0, opcode, unique, 0, 0, length)
        data = bytes(length) if opcode == protocol.WRITE else b""
        self._socket.send(head.ljust(protocol.WRITE_DATA_OFFSET) + data)

    def receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.seen.append(self._socket.recv(MIB))

    def reply(self, unique: int) -> bytes:
        """What a READ is answered with."""
        header = protocol.OUT_HEADER.pack(protocol.OUT_HEADER_SIZE + self.LENGTH, 0, unique)
        return header + os.pread(self._file, 1, 0)

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.give_back()
        self._socket.close()
        self._session.close()
