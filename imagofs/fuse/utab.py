"""umount(8)'s own table of mounts: /run/mount/utab, with which umount(8) finds its helper.

Given an absolute path, umount(8) asks statfs(2) for the type of what is mounted there. The answer
is `fuse` for every FUSE file system: there is no helper of that name, and umount(8) returns while
the daemon still writes. A mount that has a line in this table is looked up in the kernel's table
instead, where its whole type is, and umount.fuse.imagofs is run. mount(8) writes a line only for
options that no kernel knows, such as `_netdev` or `x-...`; so here every mount gets one.

The line names another source than the mount has: with the right one it would keep mount(8), if it
mounts this, from writing its own line with its own options. Its target is all that matters.

The table belongs to mount(8) and umount(8): they write to it and remove from it when asked to do
nothing else.
"""

from __future__ import annotations

import logging
import os
from typing import Final

from . import mounts

__all__ = ["enter", "is_wanted", "strike"]

log = logging.getLogger("imagofs")

_TABLE: Final = "/run/mount/utab"
_HELPER: Final = f"/sbin/umount.{mounts.FSTYPE}"
_SOURCE: Final = "imagofs"
#: What the line has for an option: there must be one.
_OPTION: Final = "x-imagofs"
_SECONDS: Final = 10.0


def is_wanted() -> bool:
    """Whether umount(8) has a helper to find."""
    return os.path.exists(_HELPER)


def enter(mount: mounts.Mount) -> None:
    """Let umount(8) find the helper for this mount. As root; a failure is only logged.

    The mount has to be served meanwhile: mount(8) may look at it.
    """
    strike(mount)  # what an earlier mount there left
    _run("mount", "-f", "-t", mount.fstype, "-o", _OPTION, "--", _SOURCE, mount.point)


def strike(mount: mounts.Mount) -> None:
    """Remove what the table says of this mount, which is gone. A failure is only logged."""
    for _ in range(_lines(mount)):  # mount(8) may have written one of its own
        _run("umount", "--fake", "--", mount.point)


def _lines(mount: mounts.Mount) -> int:
    try:
        with open(_TABLE, "rb") as table:
            lines = [line.rstrip(b"\n").split(b" ") for line in table]
    except OSError:  # nobody needed one yet
        return 0
    fields = [dict(field.partition(b"=")[::2] for field in line) for line in lines]
    return sum(
        mounts.unescape(line.get(b"TARGET", b"")) == mount.point
        and mounts.unescape(line.get(b"SRC", b"")) in (_SOURCE, mount.source)
        for line in fields
    )


def _run(program: str, *arguments: str) -> None:
    # No helper (-i), and no look at what is mounted there (-c) where that can be avoided.
    command = [program, "-i", "-c", *arguments]
    silent = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    try:  # (importing subprocess would take ten times as long as running the program)
        child = os.posix_spawnp(program, command, os.environ, file_actions=silent)
    except OSError as error:
        log.debug("cannot run %s: %s", program, error)
        return
    code = mounts.exit_code_within(_SECONDS, child)
    if code:
        log.debug("%s: exit code %d", " ".join(command), code)
    elif code is None:
        log.debug("%s: it took too long", " ".join(command))
