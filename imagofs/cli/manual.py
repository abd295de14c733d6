"""The manual pages: what the parsers and the table of mount options say, and the text around it.

The text is written in a few marks: a blank line ends a paragraph, a line that begins with four
blanks is shown as it is, and "TERM :: text" is an entry of a list.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from .. import __version__
from . import VERBS, parser_of
from .option_table import OPTIONS

__all__ = ["pages"]

_DESCRIPTION = """
imagofs opens virtual-machine disk images (qcow2, raw, VMDK) with their whole chain of backing
files, and shows the disk inside as one flat raw file through FUSE. On that file everything works
that works on a disk: dd, a loop device with its partitions, fsck, forensic tools. A write goes into
the image.

If MOUNTPOINT is a directory, the disk is the file NAME.raw in it; if it is a regular file, it
becomes the disk itself. The command returns once the mount answers, and the daemon goes on in the
background. What stands first and is no verb is the image of a mount; an image that is called like a
verb is given as ./info.
"""

_SAFE = """
After close(2) what was written is in the image file, with all metadata; after fsync(2), and when
umount(8) (with the helpers of imagofs install-helpers), imagofs umount or the stop of a unit has
returned, it is on the disk and the daemon has ended. With writeback the kernel keeps written pages
until they are synced or the file is closed.

SEEK_DATA and SEEK_HOLE never call a hole what somebody has just written: as long as the file is
open for writing the kernel is told to write back first.

The daemon takes the locks that qemu takes. A lock that is held elsewhere is an error that names the
file and the process.
"""

_SIGNALS = """
SIGTERM, SIGINT :: Log who uses the disk, unmount at once, go on serving those who have it open
until the last one closes it or stop_timeout is over, write everything to the disk, end with 0. The
second one does not wait.

SIGUSR1 :: Log the statistics.

SIGHUP :: Nothing: there is nothing to reload.
"""

_EXIT = """
0 :: Done.

1 :: A failure; one line on stderr says which, and what to do.

2 :: Wrong usage.

130 :: Interrupted.

imagofs check has codes of its own: see there.
"""

_ATTRIBUTES = """
user.imagofs.format :: The image's format.

user.imagofs.chain :: The images of the chain, the top one first, in JSON.

user.imagofs.stats :: What imagofs stat shows, in JSON.
"""

_EXAMPLES = """
    imagofs disk.qcow2 /mnt/vm
    losetup -rfP --show /mnt/vm/disk.raw
    imagofs umount /mnt/vm

A loop device with stable names for its partitions:

    imagofs disk.qcow2 /mnt/vm -o rw
    imagofs loop attach vm /mnt/vm
    mount /run/imagofs-loop/vm/part1 /srv/vm

Look into an image that nobody may change:

    imagofs disk.qcow2 /mnt/vm -o overlay,deny
"""

_HELPER = """
mount.imagofs and mount.fuse.imagofs are run by mount(8) for the types imagofs and fuse.imagofs,
umount.fuse.imagofs by umount(8); imagofs install-helpers writes them. They differ from imagofs' own
command line in this: rw is the default, nofail lets a missing image pass, remount changes what the
kernel looks after (ro, rw, nosuid, nodev, noexec ...), and the exit codes are those of mount(8).
umount(8) returns once everything is on the disk and the daemon has ended.

In /etc/fstab a blank in a path is written \\040. A comma in the value of an option is written with
a backslash before it, or the value in double quotes.

What mount(8), fstab and systemd know is accepted and means what it means: defaults, auto, noauto,
nofail, user, users, group, owner, _netdev, nosuid, nodev, noexec, noatime, sync, comment=, x-*.
"""

_HELPER_EXIT = """
0 :: Done; or the image is missing, and nofail was given.

1 :: Wrong usage, or an unknown option (unless -s is given).

2 :: The system refused something.

8 :: Interrupted.

32 :: The mount failed.
"""

_HELPER_EXAMPLES = """
    /srv/vm.qcow2  /mnt/vm   imagofs       ro,nofail           0 0
    /srv/vm.qcow2  /mnt/vm   fuse.imagofs  rw,allow_other      0 0
    /srv/b.qcow2   /mnt/b    imagofs       noauto,user         0 0

A partition of the disk of imagofs@vm.service:

    /run/imagofs-loop/vm/part1 /srv/vm ext4 _netdev,x-systemd.requires=imagofs-loop@vm.service 0 0
"""


def pages() -> dict[str, str]:
    """File name to text of each page, in roff."""
    verbs = "".join(line for verb in VERBS for line in _verb(verb))
    main = [
        _head("imagofs", 1, "show the disk in a virtual-machine image as a raw file"),
        ".SH SYNOPSIS\n.B imagofs\n[mount] IMAGE MOUNTPOINT [-f] [-v] [-o OPTION,...]\n.br\n"
        ".B imagofs\nVERB ...\n",
        _section("DESCRIPTION", _DESCRIPTION),
        f".SH VERBS\n{verbs}",
        f".SH MOUNT OPTIONS\n{_options()}",
        _section("WHEN DATA IS SAFE", _SAFE),
        _section("SIGNALS", _SIGNALS),
        _section("EXIT STATUS", _EXIT),
        _section("EXTENDED ATTRIBUTES", _ATTRIBUTES),
        _section("EXAMPLES", _EXAMPLES),
        ".SH SEE ALSO\n.BR mount.imagofs (8),\n.BR losetup (8),\n.BR qemu-img (1)\n",
    ]
    helper = [
        _head("mount.imagofs", 8, "mount a virtual-machine image with mount(8) and fstab"),
        ".SH SYNOPSIS\n.B mount -t imagofs\nIMAGE MOUNTPOINT [-o OPTION,...]\n.br\n"
        ".B umount\nMOUNTPOINT\n",
        _section("DESCRIPTION", _HELPER),
        f".SH OPTIONS\n{_options()}",
        _section("EXIT STATUS", _HELPER_EXIT),
        _section("EXAMPLES", _HELPER_EXAMPLES),
        ".SH SEE ALSO\n.BR imagofs (1),\n.BR mount (8),\n.BR fstab (5),\n.BR systemd.mount (5)\n",
    ]
    return {"imagofs.1": "".join(main), "mount.imagofs.8": "".join(helper)}


def _head(name: str, section: int, purpose: str) -> str:
    return (
        f'.TH {name.upper()} {section} "" "imagofs {__version__}"\n'
        f".SH NAME\n{_text(name)} \\- {_text(purpose)}\n"
    )


def _text(text: str) -> str:
    """Text with what roff would take for its own quoted."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return re.sub(r"^\.", r"\\&.", text, flags=re.MULTILINE)


def _section(title: str, text: str) -> str:
    return f".SH {title}\n" + "".join(_paragraph(part) for part in text.strip("\n").split("\n\n"))


def _paragraph(text: str) -> str:
    if text.startswith("    "):
        lines = "\n".join(_text(line[4:]) for line in text.splitlines())
        return f".PP\n.nf\n.RS\n{lines}\n.RE\n.fi\n"
    term, separator, meaning = text.partition(" :: ")
    if separator:
        return _entry(term, meaning)
    return f".PP\n{_text(text)}\n"


def _entry(term: str, meaning: str) -> str:
    return f".TP\n.B {_text(term)}\n{_text(meaning) or chr(92) + '&'}\n"


def _options() -> str:
    return "".join(_entry(", ".join(option.forms), f"{option.text}.") for option in OPTIONS)


def _verb(verb: str) -> Iterator[str]:
    parser = parser_of(verb)
    yield f".SS {_text(' '.join(parser.format_usage().split()).removeprefix('usage: '))}\n"
    if parser.description:
        yield f".PP\n{_text(parser.description)}\n"
    yield from _actions(parser)
    if parser.epilog and verb != "mount":
        lines = "\n".join(_text(line) for line in parser.epilog.strip("\n").splitlines())
        yield f".PP\n.nf\n{lines}\n.fi\n"


def _actions(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:  # the list has no public name
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield _entry(f"{name} {_arguments(inner)}", inner.description or "")
                yield from _actions(inner)
        elif action.help and action.dest != "help":
            names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            if action.option_strings and action.nargs != 0:
                choices = "|".join(map(str, action.choices)) if action.choices else None
                names += f" {action.metavar or choices or action.dest.upper()}"
            yield _entry(names, action.help.replace("%%", "%"))


def _arguments(parser: argparse.ArgumentParser) -> str:
    return " ".join(str(action.metavar) for action in parser._actions if not action.option_strings)
