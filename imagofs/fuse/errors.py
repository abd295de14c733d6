"""What a failed request is answered with, and what is logged about it."""

from __future__ import annotations

import errno
import logging
import time

from ..errors import ImagofsError, ReadOnlyError, errno_of

__all__ = ["FailureLog", "Refusal"]

_REPEAT_SECONDS = 60.0
_REMEMBERED = 64


class Refusal(Exception):
    """An errno that a request is answered with because that is the answer: nothing went wrong.

    Attributes:
        errno: The number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, str(number)))
        self.errno = number


class FailureLog:
    """Turns exceptions into errnos, and logs each failure once a minute at most.

    Args:
        log: Where failures are written.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._logged: dict[str, float] = {}

    def answer(self, error: BaseException, action: str) -> int:
        """The errno for `error`, which came up while doing `action` ("read 512 bytes at 0")."""
        if isinstance(error, Refusal):
            return error.errno
        number = errno_of(error)
        if not isinstance(error, ReadOnlyError) and self._is_news(error):
            name = errno.errorcode.get(number, str(number))
            reason = " ".join(str(error).split())
            if isinstance(error, ImagofsError):
                self._log.error("cannot %s: %s (answered with %s)", action, reason, name)
            else:
                kind = type(error).__name__
                self._log.error("cannot %s: %s: %s (answered with %s)", action, kind, reason, name)
                self._log.debug("the failure in full", exc_info=error)
        return number

    def _is_news(self, error: BaseException) -> bool:
        # The place of the request is part of the line, not of what makes two failures the same.
        key = f"{type(error).__name__}: {error}"
        now = time.monotonic()
        if now - self._logged.get(key, -_REPEAT_SECONDS) < _REPEAT_SECONDS:
            return False
        self._logged.pop(key, None)
        self._logged[key] = now
        if len(self._logged) > _REMEMBERED:
            del self._logged[next(iter(self._logged))]
        return True
