"""`imagofs install-helpers`: let mount(8), umount(8) and /etc/fstab know imagofs.

mount(8) runs /sbin/mount.TYPE for a type that has such a helper, and umount(8) runs
/sbin/umount.TYPE. A mount's type is fuse.imagofs in the kernel's table and may be written imagofs
too. The files that are written here hold the program's absolute path: mount(8) resets PATH.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

from . import Parser
from .installing import install, program

__all__ = ["HELPERS", "main"]

#: Name of each helper and the verb that it calls.
HELPERS: Final = {
    "mount.imagofs": "mount.imagofs",
    "mount.fuse.imagofs": "mount.imagofs",
    "umount.fuse.imagofs": "umount.imagofs",
}


def main(arguments: list[str]) -> int:
    """Write the helpers."""
    parser = Parser(
        prog="imagofs install-helpers",
        description="Write the helpers of mount(8) and umount(8), so that fstab lines and "
        "'mount -t imagofs IMAGE MOUNTPOINT' work, and umount waits until everything is on the "
        "disk. Say where the files are.",
    )
    parser.add_argument(
        "--prefix",
        metavar="DIR",
        default="/",
        help="write to DIR/sbin (default: /, and mount(8) looks nowhere else)",
    )
    words = parser.parse_args(arguments)
    called = shlex.quote(program())
    for name, verb in HELPERS.items():
        text = f"#!/bin/sh\n# Written by 'imagofs install-helpers'.\nexec {called} {verb} \"$@\"\n"
        install(Path(words.prefix) / "sbin" / name, text, mode=0o755)
    return 0
