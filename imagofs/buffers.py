"""IoBuffer: memory that O_DIRECT takes as it is."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from .errors import OutOfRangeError, WrongTypeError
from .vectors import IoVector, flat_views, total_length

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["IoBuffer"]


class IoBuffer(mmap.mmap):
    """Anonymous memory at the start of a page: a buffer that needs no copy with `direct=True`.

    It is a buffer like any other (`memoryview(buffer)[a:b]` is a part of it) with the methods of
    `mmap.mmap`; `close` gives the memory back.

    Args:
        size: Bytes, above 0. They are zero at first.
        alignment: What its address is a multiple of, in bytes: a power of two, at most
            `mmap.PAGESIZE`. It is always at least that well aligned.

    Raises:
        OutOfRangeError: `size` is below 1, or no page begins at such multiples.
        WrongTypeError: An argument is no int.
    """

    def __new__(cls, size: int, alignment: int = mmap.PAGESIZE) -> Self:
        if not isinstance(size, int) or not isinstance(alignment, int):
            raise WrongTypeError(f"no number of bytes: {size!r}, {alignment!r}")
        if size < 1:
            raise OutOfRangeError(f"a buffer of {size} bytes")
        if not 0 < alignment <= mmap.PAGESIZE or alignment & alignment - 1:
            raise OutOfRangeError(
                f"an alignment of {alignment} bytes: not a power of two up to {mmap.PAGESIZE}"
            )
        try:
            return super().__new__(cls, -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OverflowError as error:
            raise OutOfRangeError(f"a buffer of {size} bytes") from error

    @classmethod
    def copy_of(cls, buffers: Buffer | IoVector | Iterable[Buffer]) -> Self:
        """A new buffer with the bytes of `buffers`, joined.

        Raises:
            OutOfRangeError: They hold no byte.
            WrongTypeError: They are no buffers.
        """
        views = flat_views(buffers)
        copy = cls(total_length(views))
        position = 0
        for view in views:
            copy[position : position + view.nbytes] = view
            position += view.nbytes
        return copy
