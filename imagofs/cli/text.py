"""Sizes, names and tables, as people read and write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from ..errors import printable

__all__ = ["FORMATS", "format_size", "parse_size", "printable", "table"]

#: What `--format` takes. Not asked of the format registry, whose import takes longer.
FORMATS = ("qcow2", "raw", "vmdk")

_UNITS = "BKMGTPE"
_LARGEST_SIZE = (1 << 63) - 1


def parse_size(text: str) -> int:
    """Bytes of a size as qemu-img takes it: `512`, `10G`, `1.5M`, `0x1000`.

    The suffixes K, M, G, T, P and E, of either case, stand for powers of 1024; B for bytes.

    Raises:
        ValueError: It is no size, or larger than a file can be. The message says so.
    """
    if match := re.fullmatch(r"0x([0-9a-f]+)", text, re.IGNORECASE):
        size = Fraction(int(match[1], 16))
    elif match := re.fullmatch(r"(\d+(?:\.\d*)?)([BKMGTPE]?)", text, re.IGNORECASE | re.ASCII):
        # The parser of fractions wants digits behind a point.
        size = Fraction(match[1].rstrip(".")) if match[1][-1] == "." else Fraction(match[1])
        if size.denominator != 1 and match[2].upper() in ("", "B"):
            raise ValueError(f"{text!r} is no whole number of bytes")
        size *= 1 << 10 * _UNITS.index(match[2].upper() or "B")
    else:
        raise ValueError(
            f"{text!r} is no size: a number, perhaps with one of K, M, G, T, P and E behind it"
        )
    if size > _LARGEST_SIZE:
        raise ValueError(f"{text!r} is more than {_LARGEST_SIZE} bytes")
    return int(size + Fraction(1, 2))


def format_size(size: int) -> str:
    """A size with three significant digits and its unit, as `196 KiB`."""
    unit = 0
    value = float(size)
    # What would be rounded to four digits is shown in the next unit.
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.3g} {_UNITS[unit]}{'iB' if unit else ''}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Lines of columns, the heads above; `right` are the columns whose text is on the right."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
