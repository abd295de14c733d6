"""`umount.fuse.imagofs TARGET [-flnrv] ...`: what umount(8) runs.

umount(2) returns while the daemon still writes; this waits until everything is on the disk and the
daemon has ended, and so umount(8) does, and the stop of a mount unit.
"""

from __future__ import annotations

import errno
import subprocess

from ..errors import StorageError
from . import report
from .mount_helper import HelperParser, guarded
from .umount import unmount

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Unmount; returns an exit code of mount(8)."""
    parser = HelperParser(prog="umount.imagofs", description="Called by umount(8).")
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("-l", dest="lazy", action="store_true", help="even while it is used")
    parser.add_argument("-f", dest="force", action="store_true", help="sever the connection")
    parser.add_argument("-n", action="store_true", help="(there is no mtab to write)")
    parser.add_argument(
        "-r", dest="read_only", action="store_true", help="if it is used, make it read-only"
    )
    parser.add_argument("-v", action="store_true", help="(there is nothing more to say)")
    parser.add_argument("-t", metavar="TYPE", help="(there is one type only)")
    words = parser.parse_args(arguments)

    def act() -> int:
        try:
            unmount(words.target, lazy=words.lazy, force=words.force)
        except StorageError as error:
            if not words.read_only or error.errno != errno.EBUSY:
                raise
            report(f"{words.target} is used: remounting it read-only")
            # By way of mount.fuse.imagofs: the way by which newer kernels remount is not FUSE's.
            return subprocess.run(["mount", "-o", "remount,ro", words.target]).returncode
        return 0

    return guarded(act)
