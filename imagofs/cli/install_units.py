"""`imagofs install-units`: put the unit files where systemd looks."""

from __future__ import annotations

import errno
from pathlib import Path

from ..errors import StorageError
from . import Parser, report
from .installing import install, program

__all__ = ["main", "unit_files"]

_PLACE = "@imagofs@"


def unit_files() -> list[Path]:
    """The unit files as they come with the package.

    Raises:
        StorageError: It came without them.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "units", package.parent / "systemd"):
        if found := sorted(folder.glob("imagofs*.service")):
            return found
    raise StorageError("the package has no unit files", error=errno.ENOENT, filename=str(package))


def main(arguments: list[str]) -> int:
    """Write the units."""
    parser = Parser(
        prog="imagofs install-units",
        description="Write imagofs@.service and imagofs-loop@.service, with this program's path "
        "in them, to PREFIX/lib/systemd/system, and make the folder /etc/imagofs for what they "
        "read. Say where the files are.",
    )
    parser.add_argument("--prefix", metavar="DIR", default="/usr/local", help="default: /usr/local")
    parser.add_argument(
        "--root", metavar="DIR", default="/", help="the system to write to, for packagers"
    )
    words = parser.parse_args(arguments)
    called = _escape(program())
    folder = Path(words.root) / words.prefix.lstrip("/") / "lib/systemd/system"
    for file in unit_files():
        text = file.read_text(encoding="utf-8").replace(_PLACE, called)
        install(folder / file.name, text, mode=0o644)
    settings = Path(words.root) / "etc/imagofs"
    try:
        settings.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError.of("make", error, str(settings)) from error
    if words.root == "/":
        report("now run 'systemctl daemon-reload'")
    return 0


def _escape(path: str) -> str:
    """A path as a word of ExecStart=."""
    path = path.replace("%", "%%").replace("$", "$$")
    if any(letter in path for letter in " \t\"'\\;"):
        path = '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return path
