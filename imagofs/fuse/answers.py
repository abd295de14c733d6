"""Answers to the kernel: replies, and errors in their place."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .errors import FailureLog
from .protocol import error_reply

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
            self.not_sent(error)

    def reply_each(self, messages: list[Buffer]) -> None:
        """Write several replies, and empty the list."""
        for message in messages:
            try:
                os.write(self._fd, message)
            except OSError as error:
                self.not_sent(error)
        messages.clear()

    def fail(
        self, unique: int, error: Exception, what: str, offset: int = -1, size: int = -1
    ) -> None:
        """Answer a request with the errno for `error`, and log that: "cannot `what` ..."."""
        place = "" if offset < 0 else f" at {offset}" if size < 0 else f" {size} bytes at {offset}"
        self.reply(error_reply(unique, self._failures.answer(error, f"{what}{place}")))

    def not_sent(self, error: OSError) -> None:
        """Note that a reply could not be written."""
        # ENOENT: the request was aborted.
        if error.errno != errno.ENOENT and error.errno not in ENDED:
            log.error("cannot answer a request: %s", error)
