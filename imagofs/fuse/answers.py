"""Answers to the kernel: replies, and errors in their place."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from .errors import FailureLog
from .protocol import OUT_HEADER, error_reply

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ENDED", "Answers"]

log = logging.getLogger(__name__)

#: Errors of a read or a write of the connection that say that it is gone.
ENDED = frozenset({errno.ENODEV, errno.ECONNABORTED})


class Answers:
    """Writes answers to one connection. All methods are plain functions; none raises.

    Args:
        connection: The descriptor, an open /dev/fuse.
    """

    def __init__(self, connection: int) -> None:
        self._fd = connection
        self._failures = FailureLog(log)

    def reply(self, message: Buffer, data: Iterable[Buffer] = ()) -> None:
        """Write a reply: `message`, and the data that follow its header if they are elsewhere."""
        try:
            os.writev(self._fd, [message, *data])
        except OSError as error:
            self.not_sent(error, message)

    def reply_each(self, messages: list[Buffer]) -> None:
        """Write several replies, and empty the list."""
        for message in messages:
            try:
                os.write(self._fd, message)
            except OSError as error:
                self.not_sent(error, message)
        messages.clear()

    def fail(
        self, unique: int, error: Exception, what: str, offset: int = -1, size: int = -1
    ) -> None:
        """Answer a request with the errno for `error`, and log that: "cannot `what` ..."."""
        place = "" if offset < 0 else f" at {offset}" if size < 0 else f" {size} bytes at {offset}"
        self.reply(error_reply(unique, self._failures.answer(error, f"{what}{place}")))

    def not_sent(self, error: OSError, message: Buffer | None = None) -> None:
        """Note that a reply could not be written, and answer with the errno if it was this one."""
        # ENOENT: the request was aborted.
        if error.errno == errno.ENOENT or error.errno in ENDED:
            return
        log.error("cannot answer a request: %s", error)
        if message is not None:
            # The kernel had no memory, say. Who waits for an answer cannot even be killed.
            _, _, unique = OUT_HEADER.unpack_from(message)
            with suppress(OSError):
                os.write(self._fd, error_reply(unique, error.errno or errno.EIO))
