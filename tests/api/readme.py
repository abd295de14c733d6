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


def imago_table() -> dict[tuple[str, ...], list[str]]:
    """The table for those who know imago: the items of each row, and what stands for them here."""
    lines = iter(README.splitlines())
    for line in lines:
        if line.startswith("| imago 0.2 |"):
            break
    next(lines)  # the rule below the head
    table = {}
    for line in lines:
        if not line.startswith("|"):
            break
        items, here, _ = line.strip("|").split("|")
        table[tuple(re.findall(r"`([^`]+)`", items))] = re.findall(r"`([^`]+)`", here)
    return table


def shell_blocks(heading: str) -> list[str]:
    """Every indented block below a heading, up to the next one; "": before the first."""
    begin = f"## {heading}\n" if heading else "# imagofs\n"
    text = README[README.index(begin) + len(begin) :].partition("\n## ")[0]
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks]
