"""`imagofs snapshot list IMAGE`: the internal snapshots of an image."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from . import Parser
from .text import FORMATS, format_size, printable, table

__all__ = ["main", "snapshot_table"]


def main(arguments: list[str]) -> int:
    """Carry out one of the verb's actions."""
    parser = Parser(prog="imagofs snapshot", description="Look at the snapshots inside an image.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser(
        "list",
        help="list the snapshots",
        description="List the snapshots inside IMAGE. Only headers are read, and no lock is taken.",
    )
    listing.add_argument("image", metavar="IMAGE")
    listing.add_argument("--json", action="store_true", help="as qemu-img info names them")
    listing.add_argument("-f", "--format", choices=FORMATS, help="default: probed")
    words = parser.parse_args(arguments)
    import trio

    from .info import describe

    facts: list[dict[str, Any]] = trio.run(describe, words.image, words.format)
    snapshots = facts[0].get("snapshots", [])
    if words.json:
        print(json.dumps(snapshots, indent=4))
    elif snapshots:
        print(snapshot_table(snapshots))
    return 0


def snapshot_table(snapshots: Sequence[dict[str, Any]]) -> str:
    """Snapshots for people, one a line."""
    heads = ("ID", "NAME", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
    rows = [
        (
            printable(snapshot["id"]),
            printable(snapshot["name"]),
            format_size(snapshot["vm-state-size"]),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"])),
            _clock(snapshot["vm-clock-sec"], snapshot["vm-clock-nsec"]),
            str(snapshot.get("icount", "")),
        )
        for snapshot in snapshots
    ]
    return table(heads, rows, right=(2, 5))


def _clock(seconds: int, nanoseconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}.{nanoseconds // 10**6:03}"
