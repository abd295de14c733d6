"""`imagofs resize IMAGE [+-]SIZE`: change the size of the disk in an image."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import OutOfRangeError, UnsupportedError
from . import Parser, report
from .create import PREALLOCATIONS, preallocate_mode
from .text import FORMATS, parse_size

if TYPE_CHECKING:
    from ..access import FormatAccess

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Resize the image."""
    parser = Parser(
        prog="imagofs resize",
        description="Set the size of the disk in IMAGE (K, M, G, T, P, E: powers of 1024). With + "
        "or - in front, SIZE is added or taken away. The image must not be in use.",
    )
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("size", metavar="[+-]SIZE")
    parser.add_argument(
        "--preallocation",
        choices=PREALLOCATIONS,
        default="off",
        help="what to do with the space that is added (default: off)",
    )
    parser.add_argument(
        "--shrink", action="store_true", help="allow the disk to lose what is behind the new end"
    )
    parser.add_argument(
        "-f", "--format", choices=FORMATS, help="default: probed; needed for a raw image"
    )
    # A size with a minus is no option.
    words = parser.parse_args([re.sub(r"^-(?=\d)", " -", word) for word in arguments])
    match = re.fullmatch(r" ?([+-]?)(.*)", words.size, re.DOTALL)
    assert match is not None
    try:
        amount = parse_size(match[2])
    except ValueError as error:
        report(f"{error} (see 'imagofs resize --help')")
        return 2
    import trio

    from ..gate import PermissiveImplicitOpenGate
    from ..opening import open_image

    async def resize() -> None:
        image = await open_image(
            words.image.removeprefix(" "),
            writable=True,
            format=words.format,
            gate=PermissiveImplicitOpenGate(),
            lock=True,
        )
        async with image:
            await _resize(image, match[1], amount, words.preallocation, words.shrink)

    trio.run(resize)
    return 0


async def _resize(
    image: FormatAccess, sign: str, amount: int, preallocation: str, may_shrink: bool
) -> None:
    old_size = image.size()
    size = old_size + amount if sign == "+" else old_size - amount if sign == "-" else amount
    if size <= 0:
        raise OutOfRangeError(
            f"a size of {size} bytes; it must be above zero", filename=image.filename
        )
    if size < old_size and not may_shrink:
        raise UnsupportedError(
            f"the disk would shrink from {old_size} to {size} bytes and lose what is behind that; "
            f"add --shrink if nothing is",
            filename=image.filename,
        )
    if size <= old_size and preallocation != "off":
        raise UnsupportedError(
            "only an image that grows has room to preallocate", filename=image.filename
        )
    if image.format_name == "raw" and preallocation == "metadata":
        raise UnsupportedError(
            "a raw image has no metadata to preallocate; use falloc or full",
            filename=image.filename,
        )
    await image.resize(size, preallocate_mode(preallocation))
