"""What each option of a mount means: the one text behind `--help`, manual and completion."""

from __future__ import annotations

import textwrap
from typing import Final, NamedTuple

__all__ = ["OPTIONS", "MountOption", "help_text"]


class MountOption(NamedTuple):
    """An option of `-o`.

    Attributes:
        forms: How it is written, `name` or `name=VALUE`.
        text: What it means.
    """

    forms: tuple[str, ...]
    text: str


OPTIONS: Final = [
    MountOption(
        ("ro", "rw"),
        "read-only, or for reading and writing. On imagofs' own command line ro is the default, "
        "in fstab and with mount(8) rw is. Only the top image is written; backing files never are",
    ),
    MountOption(
        ("allow_other",),
        "let other users in, root included; an ordinary user who mounts needs user_allow_other "
        "in /etc/fuse.conf",
    ),
    MountOption(
        ("uid=USER", "gid=GROUP", "mode=OCTAL"),
        "owner, group and permissions of the file that is shown (default: the image's)",
    ),
    MountOption(("name=NAME",), "the file's name in a directory mount (default: from the image's)"),
    MountOption(
        ("format=FORMAT",),
        "qcow2, raw or vmdk (default: probed). A raw image is written to only with format=raw",
    ),
    MountOption(("deny",), "open nothing that the image refers to"),
    MountOption(
        ("allow=DIR",),
        "open what the image refers to only if it lies below DIR; may be given again",
    ),
    MountOption(("fsname=NAME",), "the source that mount(8) shows (default: the image's path)"),
    MountOption(("snapshot=NAME",), "show the internal snapshot with this name or ID, read-only"),
    MountOption(
        ("overlay", "overlay=FILE"),
        "the disk can be written to, and IMAGE stays as it is: what is written goes to a temporary "
        "file (below $TMPDIR or /var/tmp), or to FILE, a qcow2 on top of IMAGE, which is kept and "
        "used again",
    ),
    MountOption(
        ("lock=auto|on|off",),
        "take the locks that qemu takes, on every file of the chain. auto, the default: where the "
        "file system has such locks",
    ),
    MountOption(("direct_io",), "bypass the kernel's page cache"),
    MountOption(("writeback",), "let the kernel keep written pages back until they are synced"),
    MountOption(("channel=on|off",), "off: every request through pyfuse3; slower"),
    MountOption(
        ("awake=auto|on|off",),
        "while somebody sends one request at a time, keep idle processors from sleeping, all of "
        "them, if replies arrive faster for it (/dev/cpu_dma_latency; needs root). auto, the "
        "default: on machines with four processors at most",
    ),
    MountOption(
        ("metadata_cache=SIZE", "inflate_cache=SIZE"),
        "bounds of the caches of tables and of inflated clusters (default: 32M and 64M)",
    ),
    MountOption(
        ("setuid=USER",),
        "run as this user once the image is open and mounted; only root may ask for it",
    ),
    MountOption(
        ("confine=auto|on|off",),
        "once the image is open and mounted, give up what is not needed any more: opening files, "
        "running programs, capabilities. auto, the default: as far as the kernel can do that "
        "(landlock, seccomp); on: or do not mount",
    ),
    MountOption(
        ("stop_timeout=SECONDS",),
        "how long SIGTERM waits for those who still use the disk (default: for ever)",
    ),
    MountOption(
        ("metrics=FILE", "metrics=unix:SOCKET"),
        "keep a file with the statistics in Prometheus' text format, or answer with them, by HTTP "
        "too, whoever connects to a local socket (only the user who mounted and root may)",
    ),
    MountOption(
        ("X-mount.mkdir", "X-mount.mkdir=OCTAL"),
        "make the mountpoint if it is missing, with these permissions (default: 755)",
    ),
]

_COLUMN = 24
_WIDTH = 99


def help_text() -> str:
    """The options as `imagofs mount --help` shows them."""
    lines = ["options of -o, separated by commas (a backslash before a comma takes it literally):"]
    for option in OPTIONS:
        names = "  " + ", ".join(option.forms)
        wrapped = textwrap.wrap(option.text, _WIDTH - _COLUMN)
        if len(names) + 1 > _COLUMN:
            lines.append(names)
            names = ""
        lines.append(names.ljust(_COLUMN) + wrapped[0])
        lines += [" " * _COLUMN + line for line in wrapped[1:]]
    lines.append(
        "and what mount(8) and fstab know: nosuid, nodev, noexec, noatime, nofail, user ..."
    )
    return "\n".join(lines) + "\n"
