"""`imagofs map IMAGE`: where an image's data is."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from . import Parser
from .text import FORMATS, printable

if TYPE_CHECKING:
    from ..chainmap import ChainMap, MapEntry

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Show the map."""
    parser = Parser(
        prog="imagofs map",
        description="Show which layer of IMAGE has what of the disk, and where: on a terminal as a "
        "picture, otherwise as a table of all that is read from files.",
    )
    parser.add_argument("image", metavar="IMAGE")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="as qemu-img map --output=json")
    how.add_argument("--table", action="store_true", help="the table, on a terminal too")
    parser.add_argument("-f", "--format", choices=FORMATS, help="default: probed")
    parser.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="also if somebody else writes to the image; the map may be wrong then",
    )
    words = parser.parse_args(arguments)
    import trio

    if words.json:
        trio.run(_print_json, words)
    elif words.table or not sys.stdout.isatty():
        trio.run(_print_table, words)
    else:
        trio.run(_print_picture, words)
    return 0


@asynccontextmanager
async def _opened(words: Any) -> AsyncIterator[ChainMap]:
    from ..chainmap import ChainMap
    from ..gate import PermissiveImplicitOpenGate
    from ..opening import open_image

    image = await open_image(
        words.image,
        format=words.format,
        gate=PermissiveImplicitOpenGate(),
        lock=not words.force_share,
    )
    async with image:
        yield ChainMap(image)


async def _print_json(words: Any) -> None:
    async with _opened(words) as chain:
        before = "["
        async for entry in chain.entries():
            print(f"{before}{_as_json(entry)}", end="")
            before = ",\n"
        if before == "[":
            # A disk of no size: one entry, as qemu-img has it.
            from ..chainmap import MapEntry

            nothing = MapEntry(0, 0, depth=0, present=False, zero=False, data=False)
            print(f"[{_as_json(nothing)}", end="")
        print("]")


def _as_json(entry: MapEntry) -> str:
    facts: dict[str, int | bool] = {
        "start": entry.start,
        "length": entry.length,
        "depth": entry.depth,
        "present": entry.present,
        "zero": entry.zero,
        "data": entry.data,
        "compressed": entry.compressed,
    }
    if entry.offset is not None:
        facts["offset"] = entry.offset
    return json.dumps(facts)


async def _print_table(words: Any) -> None:
    async with _opened(words) as chain:
        print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
        async for entry in chain.entries():
            if not entry.data or entry.zero:
                continue
            filename = entry.filename or chain.layers[entry.depth].filename or ""
            place = "compressed" if entry.offset is None else f"{entry.offset:#x}"
            print(f"{entry.start:<#16x}{entry.length:<#16x}{place:<16}{printable(filename)}")


async def _print_picture(words: Any) -> None:
    from .picture import draw

    size = shutil.get_terminal_size()
    async with _opened(words) as chain:
        print(await draw(chain, width=size.columns, colours=True))
