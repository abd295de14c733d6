"""`mount.imagofs SOURCE TARGET [-sfnvrw] [-o OPTIONS] ...`: what mount(8) runs.

It differs from `imagofs mount` in what a line of fstab leads people to expect: `rw` is the default,
`nofail` lets a missing image pass, `remount` changes what is mounted already, and the exit codes
are those of mount(8).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import Final, NoReturn

from ..errors import ImagofsError, StorageError
from ..fuse import client, mounts
from . import Parser, reason_of, report
from .options import OptionError, parse_options, split_options

__all__ = ["FAILURE", "HelperParser", "guarded", "main", "split_mount_options"]

# Exit codes of mount(8).
_USAGE: Final = 1
_SYSTEM: Final = 2
_INTERRUPTED: Final = 8
FAILURE: Final = 32

#: What the kernel says of a FUSE mount that is there, and mount(8) repeats when it remounts.
_OF_THE_KERNEL: Final = re.compile(
    r"(?:fd|rootmode|user_id|group_id|max_read|blksize|subtype|helper)=|(?:default_permissions|seclabel)$"
)


class HelperParser(Parser):
    """A parser whose exit code for wrong usage is that of mount(8)."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with 1."""
        report(message)
        raise SystemExit(_USAGE)


def main(arguments: list[str]) -> int:
    """Mount or remount; returns an exit code of mount(8)."""
    parser = HelperParser(prog="mount.imagofs", description="Called by mount(8).")
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTION,...")
    parser.add_argument("-r", dest="options", action="append_const", const="ro", help="as -o ro")
    parser.add_argument("-w", dest="options", action="append_const", const="rw", help="as -o rw")
    parser.add_argument("-s", dest="sloppy", action="store_true", help="pass over unknown options")
    parser.add_argument("-f", dest="fake", action="store_true", help="look, but do not mount")
    parser.add_argument("-n", action="store_true", help="(there is no mtab to write)")
    parser.add_argument("-v", dest="verbosity", action="count", default=0, help="log more")
    parser.add_argument("-t", metavar="TYPE", help="(there is one type only)")
    words = parser.parse_args(arguments)
    options = [option for text in words.options for option in split_mount_options(text)]

    def act() -> int:
        if "remount" in options:
            wanted = [option for option in options if option != "remount"]
            # An unknown option is an error here too.
            parse_options(map(_quoted, wanted), sloppy=words.sloppy)
            return 0 if words.fake else _remount(words.target, wanted)
        return _mount(
            words.source,
            words.target,
            options,
            sloppy=words.sloppy,
            fake=words.fake,
            verbosity=words.verbosity,
        )

    return guarded(act)


def split_mount_options(text: str) -> list[str]:
    """Split options as mount(8) passes them: a value in double quotes may have commas in it.

    The kernel's own options of a mount that is there are left out.
    """
    unquoted = re.sub(
        r'="([^"]*)"(?=,|$)',
        lambda match: "=" + match[1].replace("\\", "\\\\").replace(",", "\\,"),
        text,
    )
    return [option for option in split_options(unquoted) if not _OF_THE_KERNEL.match(option)]


def _quoted(option: str) -> str:
    """One option as a text in which several could be."""
    return option.replace("\\", "\\\\").replace(",", "\\,")


def guarded(act: Callable[[], int]) -> int:
    """Do `act`; an exception becomes one line and an exit code of mount(8)."""
    try:
        return act()
    except OptionError as error:
        report(str(error))
        return _USAGE
    except ImagofsError as error:
        report(str(error))
        return FAILURE
    except OSError as error:
        report(reason_of(error))
        return _SYSTEM
    except KeyboardInterrupt:
        return _INTERRUPTED


def _mount(
    source: str, target: str, options: list[str], *, sloppy: bool, fake: bool, verbosity: int
) -> int:
    # A snapshot cannot be written to; for everything else rw is what fstab's readers expect.
    default = "ro" if any(option.startswith("snapshot=") for option in options) else "rw"
    chosen = parse_options([default, *map(_quoted, options)], sloppy=sloppy)
    if not os.path.exists(source):
        if "nofail" in options:
            return 0
        raise StorageError("there is no such image", error=errno.ENOENT, filename=source)
    if fake:
        return 0
    from ..daemon import mount

    return FAILURE if mount(source, target, chosen, verbosity=verbosity) else 0


def _remount(target: str, options: list[str]) -> int:
    """Change what the kernel looks after: the image stays open as it is."""
    point = mounts.real_path(target)
    mount = mounts.find_at(point)
    if mount is None or mount.fstype != mounts.FSTYPE:
        raise StorageError("imagofs has mounted nothing here", error=errno.EINVAL, filename=point)
    flags = client.flags_of(options)
    if not flags & client.READ_ONLY and not client.statistics(point)["writable"]:
        raise StorageError(
            "the image is open read-only: unmount it, and mount it with rw",
            error=errno.EROFS,
            filename=point,
        )
    if flags & client.READ_ONLY:
        # Nothing is written after that, and nobody would think of a sync.
        client.sync(point)
    try:
        client.remount(point, flags)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EBUSY:
            users = mounts.users(point).names
            reason = f"it is open for writing{f' (used by {users})' if users else ''}"
        raise StorageError(
            f"cannot remount: {reason}", error=error.errno or errno.EIO, filename=point
        ) from error
    return 0
