"""`imagofs install-manual`: the pages imagofs(1) and mount.imagofs(8), made from the parsers."""

from __future__ import annotations

from pathlib import Path

from . import Parser
from .installing import install
from .manual import pages

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Write the pages."""
    parser = Parser(
        prog="imagofs install-manual",
        description="Write the manual pages imagofs(1) and mount.imagofs(8) to PREFIX/share/man. "
        "Say where the files are.",
    )
    parser.add_argument("--prefix", metavar="DIR", default="/usr/local", help="default: /usr/local")
    words = parser.parse_args(arguments)
    for name, text in pages().items():
        folder = Path(words.prefix) / "share/man" / f"man{name[-1]}"
        install(folder / name, text, mode=0o644)
    return 0
