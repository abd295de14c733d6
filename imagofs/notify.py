"""Talking to systemd from a service of `Type=notify` (the protocol of sd_notify(3))."""

from __future__ import annotations

import os
import socket

__all__ = ["Notifier"]


class Notifier:
    """Tells systemd about the service; does nothing where there is no systemd that listens.

    Args:
        path: The socket's name, as in $NOTIFY_SOCKET; None: nobody listens.
        watchdog_seconds: How long systemd waits for a sign of life; None: it does not.
    """

    def __init__(self, path: str | None = None, watchdog_seconds: float | None = None) -> None:
        self.watchdog_seconds = watchdog_seconds
        self._socket: socket.socket | None = None
        if path:
            # A name in the abstract namespace is written with an @.
            self._path = "\0" + path[1:] if path.startswith("@") else path
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    @classmethod
    def from_environment(cls) -> Notifier:
        """The notifier of this process; its children do not inherit it."""
        path = os.environ.pop("NOTIFY_SOCKET", None)
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        process = os.environ.pop("WATCHDOG_PID", "")
        mine = process in ("", str(os.getpid()))
        watchdog = int(microseconds) / 1e6 if microseconds.isdigit() and mine else None
        return cls(path, watchdog)

    @property
    def active(self) -> bool:
        """Whether anybody listens."""
        return self._socket is not None

    def tell(self, **fields: str) -> None:
        """Send fields such as `READY="1"` and `STATUS="..."`; a failure is nobody's problem."""
        if self._socket is None:
            return
        lines = (f"{name}={' '.join(value.splitlines())}\n" for name, value in fields.items())
        try:
            self._socket.sendto(os.fsencode("".join(lines)), self._path)
        except OSError:  # systemd restarts, or does not listen any more
            pass
