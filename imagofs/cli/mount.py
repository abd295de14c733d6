"""`imagofs [mount] IMAGE MOUNTPOINT`: show the disk inside an image."""

from __future__ import annotations

from . import Parser, report
from .option_table import help_text
from .options import OptionError, parse_options

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Mount, and return when the mount answers; with -f, when it has ended."""
    from argparse import RawDescriptionHelpFormatter

    parser = Parser(
        prog="imagofs",
        usage="imagofs [mount] IMAGE MOUNTPOINT [-f] [-v] [-o OPTION[,OPTION...]]",
        description="Show the disk inside IMAGE as MOUNTPOINT/NAME.raw, or, if MOUNTPOINT is a "
        "regular file, as MOUNTPOINT itself.",
        epilog=help_text(),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument(
        "-f", "--foreground", action="store_true", help="stay in the foreground, log to stderr"
    )
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more; twice: all")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTION,...")
    words = parser.parse_args(arguments)
    try:
        options = parse_options(words.options)
    except OptionError as error:
        report(str(error))
        return 2
    from ..daemon import mount

    return mount(
        words.image,
        words.mountpoint,
        options,
        foreground=words.foreground,
        verbosity=words.verbose,
    )
