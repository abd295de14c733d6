"""`imagofs create IMAGE [SIZE]`: make an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from . import Parser, report
from .options import split_options
from .text import parse_size

if TYPE_CHECKING:
    from ..storage.base import PreallocateMode

__all__ = ["PREALLOCATIONS", "main", "preallocate_mode"]

_OPTIONS: Final = """\
options of -o, separated by commas (a backslash before a comma takes it literally):
  size=SIZE                instead of SIZE behind the image
  preallocation=MODE       off, metadata (not raw), falloc or full
and for qcow2:
  compat=VERSION           1.1 (also v3; the default) or 0.10 (also v2)
  cluster_size=SIZE        512 to 2M, a power of two (default: 64K)
  refcount_bits=BITS       1 to 64, a power of two (default: 16)
  backing_file=, backing_fmt=
                           as -b and -F
  data_file=FILE           keep the guest's data in FILE; relative to the image, and created too
  data_file_raw=on|off     FILE is to show the disk's contents by itself
  extended_l2=on|off       subclusters: space is given out in 32nds of a cluster
  compression_type=zlib|zstd
  lazy_refcounts=on|off    let other programs postpone refcounts
"""

#: What `preallocation` may be, and the `PreallocateMode` it stands for.
PREALLOCATIONS: Final = {
    "off": "NONE",
    "metadata": "FORMAT_ALLOCATE",
    "falloc": "FULL_ALLOCATE",
    "full": "WRITE_DATA",
}


def preallocate_mode(name: str) -> PreallocateMode:
    """The mode that a word of `PREALLOCATIONS` stands for."""
    from ..storage.base import PreallocateMode

    return PreallocateMode[PREALLOCATIONS[name]]


def main(arguments: list[str]) -> int:
    """Create the image."""
    from argparse import RawDescriptionHelpFormatter

    parser = Parser(
        prog="imagofs create",
        description="Make an image with a disk of SIZE bytes (K, M, G, T, P, E: powers of 1024), "
        "or of the backing file's size.",
        epilog=_OPTIONS,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("-f", "--format", choices=("qcow2", "raw"), default="qcow2")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="KEY=VALUE,...", help="see below"
    )
    parser.add_argument(
        "-b", "--backing", metavar="FILE", help="the backing file; relative to the image"
    )
    parser.add_argument("-F", "--backing-format", metavar="FORMAT", help="its format")
    parser.add_argument(
        "-u", "--unsafe", action="store_true", help="do not open the backing file to check it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("size", metavar="SIZE", nargs="?")
    words = parser.parse_args(arguments)
    try:
        size, options = _parse(words.options, words.size)
        _add(options, "backing_file", words.backing, "-b")
        _add(options, "backing_format", words.backing_format, "-F")
    except ValueError as error:
        report(f"{error} (see 'imagofs create --help')")
        return 2
    if words.overwrite:
        options["overwrite"] = True
    import trio

    from ..creating import create_image
    from ..gate import PermissiveImplicitOpenGate

    options["gate"] = PermissiveImplicitOpenGate()
    if words.unsafe:
        options["check_backing"] = False

    async def create() -> None:
        await create_image(words.image, words.format, size, **options)

    trio.run(create)
    return 0


def _parse(texts: list[str], size_text: str | None) -> tuple[int | None, dict[str, Any]]:
    """Size and keywords for `create_image`.

    Raises:
        ValueError: The message says what is wrong.
    """
    size = None if size_text is None else parse_size(size_text)
    options: dict[str, Any] = {}
    for option in (option for text in texts for option in split_options(text)):
        name, equals, value = option.partition("=")
        if name not in _PARSERS:
            raise ValueError(f"unknown option {option!r}")
        if not equals:
            raise ValueError(f"option {name!r} needs a value: {name}=...")
        keyword, parse = _PARSERS[name]
        try:
            parsed = parse(value)
        except ValueError as error:
            raise ValueError(f"option {option!r}: {error}") from None
        if name != "size":
            options[keyword] = parsed
        elif size_text is not None:
            raise ValueError("the size is given twice")
        else:
            size = parsed
    return size, options


def _add(options: dict[str, Any], keyword: str, value: str | None, flag: str) -> None:
    if value is None:
        return
    if options.get(keyword, value) != value:
        raise ValueError(f"{flag} {value!r} and an option of -o contradict each other")
    options[keyword] = value


def _switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError("on or off")
    return value == "on"


def _version(value: str) -> int:
    versions = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
    if value not in versions:
        raise ValueError(f"known are {', '.join(versions)}")
    return versions[value]


def _preallocation(value: str) -> PreallocateMode:
    if value not in PREALLOCATIONS:
        raise ValueError(f"known are {', '.join(PREALLOCATIONS)}")
    return preallocate_mode(value)


def _number(value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise ValueError("not a number")
    return int(value)


_PARSERS: Final[dict[str, tuple[str, Any]]] = {
    "size": ("size", parse_size),
    "preallocation": ("preallocate", _preallocation),
    "compat": ("version", _version),
    "cluster_size": ("cluster_size", parse_size),
    "refcount_bits": ("refcount_bits", _number),
    "backing_file": ("backing_file", str),
    "backing_fmt": ("backing_format", str),
    "data_file": ("data_file", str),
    "data_file_raw": ("data_file_raw", _switch),
    "extended_l2": ("extended_l2", _switch),
    "compression_type": ("compression_type", str),
    "lazy_refcounts": ("lazy_refcounts", _switch),
}
