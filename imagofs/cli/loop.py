"""`imagofs loop attach|detach NAME ...`: a loop device on a mounted disk, with its partitions."""

from __future__ import annotations

import logging

from .. import loop
from ..logs import log_to_stderr
from . import Parser

__all__ = ["main"]

log = logging.getLogger("imagofs")


def main(arguments: list[str]) -> int:
    """Attach or detach."""
    parser = Parser(
        prog="imagofs loop",
        description=f"Attach a loop device to a disk that imagofs has mounted, with its partitions "
        f"and with names that stay: {loop.FOLDER}/NAME/disk, part1, part2 ...",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="attach|detach")
    attach = verbs.add_parser("attach", help="attach; prints the device")
    attach.add_argument("name", metavar="NAME")
    attach.add_argument("mountpoint", metavar="MOUNTPOINT")
    attach.add_argument(
        "-b", "--sector-size", type=int, metavar="BYTES", help="512 (the default) to 4096"
    )
    attach.add_argument(
        "--direct-io", choices=["on", "off"], default="on", help="bypass the page cache below it"
    )
    detach = verbs.add_parser("detach", help="bring everything to the disk, and detach")
    detach.add_argument("name", metavar="NAME")
    words = parser.parse_args(arguments)
    log_to_stderr(0)
    if words.verb == "attach":
        device = loop.attach(
            words.name,
            words.mountpoint,
            sector_size=words.sector_size,
            direct_io=words.direct_io == "on",
        )
        log.info("%s: attached %s", words.mountpoint, device)
        print(device)
    else:
        loop.detach(words.name)
        log.info("detached %s", words.name)
    return 0
