"""What a daemon tells by itself while it serves: to systemd, and to a file of metrics."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .fuse.session import Session
    from .notify import Notifier

__all__ = ["ask_for_time", "microseconds", "report"]

log = logging.getLogger("imagofs")

_REPORT_SECONDS: Final = 5.0
_MORE_TIME_SECONDS: Final = 30.0


def microseconds(seconds: float) -> str:
    """A time as systemd reads it."""
    return str(int(seconds * 1_000_000))


async def report(notifier: Notifier, session: Session, file: str | None) -> None:
    """Tell systemd that this process lives and what it did; keep the file of metrics.

    Runs until it is cancelled; the file then stays.

    Args:
        notifier: Who is told.
        session: Whose statistics.
        file: Path of the file, None for none.
    """
    import trio

    if not notifier.active and file is None:
        return
    failed = False
    seconds = min(_REPORT_SECONDS, (notifier.watchdog_seconds or _REPORT_SECONDS) / 3)
    while True:
        if file is not None:
            failed = not await _write_metrics(session, file, silent=failed)
        await trio.sleep(seconds)
        notifier.tell(WATCHDOG="1", STATUS=session.statistics())


async def ask_for_time(notifier: Notifier) -> None:
    """Keep systemd from cutting a flush off, until this is cancelled."""
    import trio

    while notifier.active:
        notifier.tell(WATCHDOG="1", EXTEND_TIMEOUT_USEC=microseconds(_MORE_TIME_SECONDS))
        await trio.sleep(_MORE_TIME_SECONDS / 6)


async def _write_metrics(session: Session, path: str, *, silent: bool) -> bool:
    """Replace the file of metrics; a failure is logged unless `silent`, and the answer False."""
    import trio

    text = session.metrics()

    def write() -> None:
        new = f"{path}.new"
        try:
            os.unlink(new)  # of a daemon that crashed; or a link, which is not to be followed
        except FileNotFoundError:
            pass
        with open(new, "x", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        os.replace(new, path)

    try:
        await trio.to_thread.run_sync(write)
    except OSError as error:
        if not silent:
            log.warning("%s: cannot write the metrics: %s", path, error.strerror or error)
        return False
    return True
