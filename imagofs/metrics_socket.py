"""Statistics on a local socket: `-o metrics=unix:PATH`.

Whoever connects gets the figures of that moment, in Prometheus' text format: as the answer to an
HTTP request (`curl --unix-socket PATH http://localhost/metrics`), or as they are to a client that
closes its side, or says nothing for a second (`nc -U PATH`). Only the user who mounted, and root,
may connect.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import stat
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

__all__ = ["listen", "serve"]

log = logging.getLogger(__name__)

_REQUEST_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 10.0
_REQUEST_BYTES: Final = 1 << 14
_REQUEST: Final = re.compile(rb"([A-Z]+) [^\r\n]+ HTTP/1\.[0-9]\r?\n")
_HEAD: Final = (
    "HTTP/1.1 {status}\r\n"
    "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
    "Content-Length: {length}\r\n"
    "Connection: close\r\n\r\n"
)


def listen(path: str) -> socket.socket:
    """Make the socket; one that nobody listens on any more is replaced.

    Raises:
        OSError: It cannot be made, or somebody listens there.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            listener.bind(path)
        listener.listen(16)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def _is_stale(path: str) -> bool:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(path)
        except ConnectionRefusedError:
            return True
    return False


async def serve(listener: socket.socket, figures: Callable[[], str]) -> None:
    """Answer everybody who connects, until this is cancelled; the listener then is closed.

    Args:
        listener: What `listen` made.
        figures: Gives the text.
    """
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
    await trio.serve_listeners(partial(_answer, figures), listeners)


async def _answer(figures: Callable[[], str], client: trio.SocketStream) -> None:
    try:
        with trio.move_on_after(_ANSWER_SECONDS):
            async with client:
                request = await _request(client)
                await client.send_all(_reply(request, figures()))
    except trio.BrokenResourceError:  # it did not wait for the answer
        pass
    except Exception as error:  # of no concern to the mount
        log.warning("cannot answer on the metrics' socket: %r", error)


async def _request(client: trio.SocketStream) -> bytes:
    request = b""
    with trio.move_on_after(_REQUEST_SECONDS):
        while not re.search(rb"\r?\n\r?\n", request) and len(request) < _REQUEST_BYTES:
            chunk = await client.receive_some(4096)
            if not chunk:
                break
            request += chunk
    return request


def _reply(request: bytes, text: str) -> bytes:
    body = text.encode("utf-8", "surrogateescape")
    method = _REQUEST.match(request)
    if method is None:
        return body
    status = "200 OK" if method[1] in (b"GET", b"HEAD") else "405 Method Not Allowed"
    head = _HEAD.format(status=status, length=len(body)).encode()
    return head if method[1] == b"HEAD" else head + body
