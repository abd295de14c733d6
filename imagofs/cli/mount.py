"""`imagofs [mount] IMAGE MOUNTPOINT`: show the disk inside an image."""

from __future__ import annotations

from . import Parser, report
from .options import OptionError, parse_options

__all__ = ["main"]

_OPTIONS = """\
options of -o, separated by commas:
  ro, rw                read-only (the default), or for reading and writing
  allow_other           let other users in, root included
  uid=, gid=, mode=     owner, group and permissions of the file (default: the image's)
  name=NAME             name of the file in a directory mount
  format=FORMAT         qcow2, raw or vmdk (default: probed)
  deny                  open nothing that the image refers to
  allow=DIR             only what lies below DIR; may be given again
  fsname=NAME           the source that mount(8) shows (default: the image's path)
  snapshot=NAME         show an internal snapshot
  lock=on|off|auto      take the locks that qemu takes (default: auto: where the file system has
                        such locks)
  direct_io             bypass the kernel's page cache
  writeback             let the kernel keep written pages back
  channel=on|off        off: every request through pyfuse3
  metadata_cache=SIZE, inflate_cache=SIZE
                        bounds of the caches (default: 32M and 64M)
  overlay, overlay=FILE rw, but IMAGE stays as it is: what is written goes to a temporary file, or
                        to FILE, a qcow2 on top of IMAGE, which is kept and used again
  setuid=USER           run as this user once the image is open and mounted (root only)
  stop_timeout=SECONDS  how long SIGTERM waits for those who use it (default: for ever)
  metrics=FILE          keep a file with the statistics, in Prometheus' text format
  X-mount.mkdir         make the mountpoint if it is missing
and the options of mount(8) for the kernel: nosuid, nodev, noexec, noatime ...
"""


def main(arguments: list[str]) -> int:
    """Mount, and return when the mount answers; with -f, when it has ended."""
    from argparse import RawDescriptionHelpFormatter

    parser = Parser(
        prog="imagofs",
        usage="imagofs [mount] IMAGE MOUNTPOINT [-f] [-v] [-o OPTION[,OPTION...]]",
        description="Show the disk inside IMAGE as MOUNTPOINT/NAME.raw, or, if MOUNTPOINT is a "
        "regular file, as MOUNTPOINT itself.",
        epilog=_OPTIONS,
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
