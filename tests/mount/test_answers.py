"""Answers to the kernel: what becomes of a reply that it refuses."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator

import pytest

from imagofs.fuse.answers import Answers
from imagofs.fuse.protocol import OUT_HEADER, error_reply


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection, and its other end."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.setblocking(False)
    yield here, there
    here.close()
    there.close()


def refuse(monkeypatch: pytest.MonkeyPatch, connection: int, number: int) -> None:
    """Have the kernel refuse all replies that are longer than a header."""
    write = os.write

    def writev(fd: int, parts: list[bytes]) -> int:
        if fd == connection and sum(map(len, parts)) > OUT_HEADER.size:
            raise OSError(number, os.strerror(number))
        return write(fd, b"".join(parts))

    monkeypatch.setattr(os, "writev", writev)
    monkeypatch.setattr(os, "write", lambda fd, part: writev(fd, [part]))


@pytest.mark.parametrize("several", [False, True])
def test_whoever_waits_is_told(
    ends: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    several: bool,
) -> None:
    here, there = ends
    refuse(monkeypatch, here.fileno(), errno.ENOMEM)
    header = OUT_HEADER.pack(OUT_HEADER.size + 5, 0, 42)
    if several:
        Answers(here.fileno()).reply_each([header + b"12345"])
    else:
        Answers(here.fileno()).reply(header, [b"123", b"45"])
    assert there.recv(100) == error_reply(42, errno.ENOMEM)
    assert "cannot answer a request" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV])
def test_nobody_waits(
    ends: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    here, there = ends
    refuse(monkeypatch, here.fileno(), number)
    Answers(here.fileno()).reply(OUT_HEADER.pack(OUT_HEADER.size + 1, 0, 42), [b"1"])
    with pytest.raises(BlockingIOError):
        there.recv(100)
    assert not caplog.text


def test_a_connection_that_refuses_all_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with caplog.at_level(logging.ERROR):
        Answers(full).reply(OUT_HEADER.pack(OUT_HEADER.size, 0, 42))
    os.close(full)
    assert caplog.text.count("cannot answer") == 1
