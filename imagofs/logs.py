"""Where the daemon's log goes: stderr, the journal behind it, or syslog."""

from __future__ import annotations

import logging
import os
import syslog
from typing import Final

__all__ = ["log_to_stderr", "log_to_syslog"]

_PRIORITIES: Final = {
    logging.CRITICAL: syslog.LOG_CRIT,
    logging.ERROR: syslog.LOG_ERR,
    logging.WARNING: syslog.LOG_WARNING,
    logging.INFO: syslog.LOG_INFO,
}


def log_to_stderr(verbosity: int) -> None:
    """Log to stderr: as lines for people, or with their levels for the journal."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("imagofs: %(message)s"))
    if _stderr_is_the_journal():
        handler.setFormatter(_JournalFormatter())
    _log_to(handler, verbosity)


def _stderr_is_the_journal() -> bool:
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class _JournalFormatter(logging.Formatter):
    """Lines that begin with their level, as sd-daemon(3) says."""

    def format(self, record: logging.LogRecord) -> str:
        """Every line gets the prefix."""
        level = f"<{_PRIORITIES.get(record.levelno, syslog.LOG_DEBUG)}>"
        return "\n".join(level + line for line in super().format(record).splitlines())


def log_to_syslog(verbosity: int) -> None:
    """Log to the system's log."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                text = self.format(record).encode("utf-8", "backslashreplace").replace(b"\0", b"")
                priority = _PRIORITIES.get(record.levelno, syslog.LOG_DEBUG)
                syslog.syslog(priority, text.decode())
            except Exception:
                self.handleError(record)

    syslog.openlog("imagofs", syslog.LOG_PID, syslog.LOG_DAEMON)
    _log_to(Handler(), verbosity)


def _log_to(handler: logging.Handler, verbosity: int) -> None:
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbosity >= 2 else logging.INFO)
    logging.getLogger("imagofs").setLevel(logging.DEBUG if verbosity else logging.INFO)
    # It calls a reply to a request that was aborted meanwhile an error.
    logging.getLogger("pyfuse3").setLevel(logging.NOTSET if verbosity >= 2 else logging.CRITICAL)
