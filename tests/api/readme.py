"""The README, as the tests read it."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


def python_blocks() -> list[tuple[int, str]]:
    """Every fenced block of Python: the number of its first line, and its text."""
    return [
        (README[: found.start(1)].count("\n") + 1, found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    ]


def imago_table() -> dict[str, list[str]]:
    """The table for those who know imago: its items, and what stands for each here."""
    lines = iter(README.splitlines())
    for line in lines:
        if line.startswith("| imago 0.2 |"):
            break
    next(lines)  # the rule below the head
    table = {}
    for line in lines:
        if not line.startswith("|"):
            break
        item, here, _ = (cell.strip() for cell in line.strip("|").split("|"))
        table[item.strip("`")] = re.findall(r"`([^`]+)`", here)
    return table
