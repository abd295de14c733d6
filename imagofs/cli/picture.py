"""The picture that `imagofs map` draws on a terminal: a line for each layer."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .text import format_size, printable

if TYPE_CHECKING:
    from ..chainmap import ChainMap, MapEntry

__all__ = ["draw"]

#: How full a column is, in eighths.
_LEVELS = " ▁▂▃▄▅▆▇█"
_ZERO = "·"
_SHOWN, _COMPRESSED, _HIDDEN, _RESET = "\x1b[32m", "\x1b[33m", "\x1b[90m", "\x1b[0m"
_NARROWEST = 10
_LONGEST_NAME = 24


@dataclass
class _Row:
    """One layer, as `columns` pieces of the disk of the same size.

    Attributes:
        name: The file's name.
        size: The layer's size in bytes.
        data: Bytes with data in each column.
        compressed: Those of them that are compressed.
        zero: Bytes that the layer says are zero.
        shown: Bytes of data that the guest sees, no layer above hides them.
    """

    name: str
    size: int
    columns: int
    data: list[int] = field(default_factory=list)
    compressed: list[int] = field(default_factory=list)
    zero: list[int] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("data", "compressed", "zero", "shown"):
            setattr(self, name, [0] * self.columns)


async def draw(chain: ChainMap, *, width: int, colours: bool) -> str:
    """The picture, as lines.

    Args:
        chain: The open image.
        width: Columns of the terminal.
        colours: Whether to use colours; never where NO_COLOR is set.

    Raises:
        CorruptImageError: A table entry is wrong.
        StorageError: A storage failed.
    """
    names = [
        printable(os.path.basename(layer.filename or layer.format_name)) for layer in chain.layers
    ]
    names = [
        name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name in names
    ]
    room = max(map(len, names))
    columns = max(_NARROWEST, width - room - len("  ▕▏ 100 % 1023 MiB") - 1)
    disk = max(chain.layers[0].size(), 1)
    rows = [
        _Row(name, layer.size(), columns) for name, layer in zip(names, chain.layers, strict=True)
    ]
    for depth, row in enumerate(rows):
        async for entry in chain.layer_entries(depth):
            if entry.start >= disk:
                break
            if entry.data and not entry.zero:
                _add(row.data, entry, disk)
                if entry.compressed:
                    _add(row.compressed, entry, disk)
            elif entry.zero and entry.present:
                _add(row.zero, entry, disk)
    async for entry in chain.entries():
        if entry.data and not entry.zero:
            _add(rows[entry.depth].shown, entry, disk)
    colours = colours and not os.environ.get("NO_COLOR")
    lines = [f"{'':{room}}  ▕{_ruler(disk, columns)}▏"]
    for row in rows:
        share = f"{sum(row.data) * 100 / disk:.0f} %"
        bar = _bar(row, disk, colours)
        amount = format_size(sum(row.data))
        lines.append(f"{row.name:{room}}  ▕{bar}▏{share:>6}{amount:>9}")
    lines.append("")
    lines += [_totals(depth, row) for depth, row in enumerate(rows)]
    return "\n".join(lines)


def _add(amounts: list[int], entry: MapEntry, disk: int) -> None:
    """Add the bytes of a range to the columns that it lies in."""
    columns = len(amounts)
    start, end = entry.start, min(entry.start + entry.length, disk)
    first, last = start * columns // disk, -(-end * columns // disk)
    for column in range(first, min(last, columns)):
        low, high = column * disk // columns, (column + 1) * disk // columns
        amounts[column] += max(0, min(end, high) - max(start, low))


def _ruler(disk: int, columns: int) -> str:
    """The size of the disk, over the bars."""
    text = f" 0 … {format_size(disk)} "
    return text.center(columns, "─") if len(text) < columns else "─" * columns


def _bar(row: _Row, disk: int, colours: bool) -> str:
    parts = []
    last_colour = ""
    for column in range(row.columns):
        length = (column + 1) * disk // row.columns - column * disk // row.columns
        data = row.data[column]
        if data:
            # Whatever is there is seen, and only what is full is full.
            level = min(max(data * 8 // max(length, 1), 1), 8)
            letter = _LEVELS[level]
        else:
            letter = _ZERO if row.zero[column] else " "
        colour = _HIDDEN
        if row.shown[column] * 2 >= data > 0:
            colour = _COMPRESSED if row.compressed[column] * 2 >= data else _SHOWN
        if colours and letter != " " and colour != last_colour:
            parts.append(colour)
            last_colour = colour
        parts.append(letter)
    return "".join(parts) + (_RESET if last_colour else "")


def _totals(depth: int, row: _Row) -> str:
    data, shown = sum(row.data), sum(row.shown)
    facts = [f"{format_size(data)} of data in a disk of {format_size(row.size)}"]
    if data > shown:
        facts.append(f"{format_size(data - shown)} hidden by layers above")
    if sum(row.compressed):
        facts.append(f"{format_size(sum(row.compressed))} compressed")
    if sum(row.zero):
        facts.append(f"{format_size(sum(row.zero))} said to be zero")
    return f"layer {depth}, {row.name}: {', '.join(facts)}"
