"""The command line: finds the verb, and says what failed in one line.

A verb is a module of this package with a function `main(arguments) -> int` that returns the exit
code. It is imported when it is asked for, so that a mount does not wait for what it does not use.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, Final, NoReturn

from .. import __version__
from ..errors import ImagofsError

__all__ = ["Parser", "main", "parser_of", "reason_of", "report"]

#: Verb to what it does, in a few words.
VERBS: Final = {
    "mount": "mount an image (the verb may be left out)",
    "umount": "unmount, and wait until everything is on the disk",
    "stat": "show what a mount has done so far",
    "info": "say what an image is made of",
    "check": "check an image, and repair it",
    "map": "show where an image's data is",
    "create": "make an image",
    "resize": "change the size of the disk in an image",
    "snapshot": "list the snapshots inside an image",
    "loop": "attach a loop device to a mounted disk, with its partitions",
    "install-helpers": "let mount(8) and /etc/fstab know imagofs",
    "install-units": "let systemd know imagofs",
    "install-manual": "install the manual pages",
    "completion": "print what makes a shell complete imagofs' words",
}

#: What mount(8) and umount(8) call, through the helpers that `install-helpers` writes.
_HELPERS: Final = {"mount.imagofs": "mount_helper", "umount.imagofs": "umount_helper"}

_USAGE: Final = """\
usage: imagofs [mount] IMAGE MOUNTPOINT [-f] [-v] [-o OPTION[,OPTION...]]
       imagofs VERB ...
       imagofs --help | --version

Show the disk inside a virtual-machine image (qcow2, raw, VMDK), with its whole chain of backing
files, as one flat raw file.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line.

    Attributes:
        found: While it is a list, parsers are put there instead of being used: for the manual.
    """

    found: ClassVar[list[argparse.ArgumentParser] | None] = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, unless only the parser itself was asked for."""
        if Parser.found is not None:
            Parser.found.append(self)
            raise _ParserFound
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with 2."""
        report(f"{message} (see '{self.prog} --help')")
        sys.exit(2)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb, to read what it takes."""
    Parser.found = []
    try:
        importlib.import_module(f"{__name__}.{verb.replace('-', '_')}").main([])
    except _ParserFound:
        pass
    finally:
        found, Parser.found = Parser.found, None
    return found[0]


class _ParserFound(Exception):
    """Ends a verb that was only asked for its parser."""


def report(message: str) -> None:
    """Print one line to stderr."""
    print("imagofs:", " ".join(message.splitlines()), file=sys.stderr, flush=True)


def _open_standard_streams() -> None:
    """See that 0, 1 and 2 are open: an image must not get such a number, and a log with it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # it was closed when the program was started
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115 stays open
            setattr(sys, name, stream)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: The words after the program's name; None: the process's own.

    Returns:
        The exit code: 0, 1 for a failure, 2 for wrong usage, 130 if it was interrupted.
    """
    _open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names have letters that it may not have
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        report("an image and a mountpoint are needed (see 'imagofs --help')")
        return 2
    try:
        code = _run(words)
        sys.stdout.flush()
    except ImagofsError as error:
        report(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:  # the interpreter must not trip over it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):  # then who read the output has enough
            report(reason_of(error))
        return 1
    return code


def _run(words: list[str]) -> int:
    """Do what the words say; returns the exit code."""
    if words[0] in ("-h", "--help"):
        print(_USAGE)
        print("verbs ('imagofs VERB --help' says more):")
        for verb, purpose in VERBS.items():
            print(f"  {verb:<17}{purpose}")
        return 0
    if words[0] in ("-V", "--version"):
        print(f"imagofs {__version__}")
        return 0
    verb = words.pop(0) if words[0] in VERBS or words[0] in _HELPERS else "mount"
    module = _HELPERS.get(verb) or verb.replace("-", "_")
    code: int = importlib.import_module(f"{__name__}.{module}").main(words)
    return code


def reason_of(error: OSError) -> str:
    """What is wrong, in one line, with the file if there is one, or of the current directory."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    try:
        os.getcwd()
    except OSError as gone:
        return f"the current directory cannot be used: {gone.strerror}"
    return reason
