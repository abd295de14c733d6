"""Vectors of buffers: what a vectored read fills and a vectored write takes.

A vector holds flat byte views (`memoryview` of format ``B``) of the caller's buffers: splitting,
joining and inserting move views, never data. Anything with the buffer protocol fits: bytes,
bytearray, memoryview, mmap, array, numpy arrays. This is also how a guest's memory in an mmap is
read into and written from directly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Self

from .arguments import check_type
from .errors import OutOfRangeError, WrongTypeError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "IoVector",
    "IoVectorMut",
    "copy_into",
    "fill_view",
    "fill_views",
    "flat_view",
    "flat_views",
    "is_address_aligned",
    "split_views",
    "total_length",
    "views_aligned",
    "zero_views",
]


def flat_view(buffer: Buffer) -> memoryview:
    """A one-dimensional byte view of `buffer`, without a copy.

    Raises:
        WrongTypeError: `buffer` has no buffer protocol, or is not contiguous.
    """
    try:
        view = memoryview(buffer)
    except TypeError as error:
        raise WrongTypeError(f"{type(buffer).__name__} is no buffer") from error
    except (ValueError, BufferError) as error:  # a released view; an array of dates
        raise WrongTypeError(f"cannot use a {type(buffer).__name__}: {error}") from error
    if view.ndim == 1 and view.format == "B" and view.contiguous:
        return view
    if not view.nbytes:  # a shape with a zero in it cannot be cast
        return memoryview(b"" if view.readonly else bytearray())
    if not view.c_contiguous:
        raise WrongTypeError(f"the bytes of a {type(buffer).__name__} do not lie in one piece")
    return view.cast("B")


def flat_views(buffers: Buffer | IoVector | Iterable[Buffer]) -> list[memoryview]:
    """Byte views of one buffer, of a vector, or of several buffers; empty ones are left out.

    Raises:
        WrongTypeError: It is neither, or one of them is not contiguous.
    """
    if isinstance(buffers, IoVector):
        return buffers.views
    if isinstance(buffers, (list, tuple)):
        return [view for view in map(flat_view, buffers) if view.nbytes]
    try:
        view = memoryview(buffers)  # type: ignore[arg-type]
    except TypeError:
        if isinstance(buffers, str) or not isinstance(buffers, Iterable):
            raise WrongTypeError(f"{type(buffers).__name__} holds no buffers") from None
        return [view for view in map(flat_view, buffers) if view.nbytes]
    except (ValueError, BufferError) as error:
        raise WrongTypeError(f"cannot use a {type(buffers).__name__}: {error}") from error
    return [flat_view(view)] if view.nbytes else []


def total_length(views: Iterable[memoryview]) -> int:
    """Bytes in all `views`."""
    return sum(view.nbytes for view in views)


def copy_into(views: list[memoryview], data: Buffer) -> list[memoryview]:
    """Copy `data` into the first bytes of `views`; return the rest of those."""
    targets, rest = split_views(views, memoryview(data).nbytes)
    position = 0
    for target in targets:
        step = target.nbytes
        target[:] = memoryview(data)[position : position + step]
        position += step
    return rest


def split_views(views: list[memoryview], length: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `length` bytes of `views`, and the rest, as views of the same memory."""
    head: list[memoryview] = []
    for index, view in enumerate(views):
        if length >= view.nbytes:
            head.append(view)
            length -= view.nbytes
        elif length:
            head.append(view[:length])
            return head, [view[length:], *views[index + 1 :]]
        else:
            return head, views[index:]
    return head, []


class IoVector:
    """A vector of buffers whose bytes are read: the source of a write.

    Args:
        buffers: Objects with the buffer protocol; empty ones are left out.

    Raises:
        WrongTypeError: One of them has no buffer protocol, or is not contiguous; or they are no
            iterable.
    """

    __slots__ = ("views",)

    #: The flat byte views, in order. Treat the list as read-only.
    views: list[memoryview]

    def __init__(self, buffers: Iterable[Buffer] = ()) -> None:
        check_type("what holds the buffers", buffers, Iterable)
        self.views = [view for view in map(self._view, buffers) if view.nbytes]

    @staticmethod
    def _view(buffer: Buffer) -> memoryview:
        return flat_view(buffer)

    @classmethod
    def _of_views(cls, views: list[memoryview]) -> Self:
        vector = cls()
        vector.views = views
        return vector

    def __len__(self) -> int:
        """Bytes in the whole vector (not the number of buffers)."""
        return total_length(self.views)

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self.views)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.views)} buffers, {len(self)} bytes)"

    @property
    def buffer_count(self) -> int:
        """How many buffers the vector has."""
        return len(self.views)

    def push(self, buffer: Buffer) -> None:
        """Append one buffer."""
        view = self._view(buffer)
        if view.nbytes:
            self.views.append(view)

    def insert(self, index: int, buffer: Buffer) -> None:
        """Insert one buffer before the `index`-th."""
        view = self._view(buffer)
        if view.nbytes:
            self.views.insert(index, view)

    def append(self, other: IoVector) -> None:
        """Append all buffers of `other`.

        Raises:
            WrongTypeError: `other` is no vector, or has a read-only buffer where this one must not.
        """
        check_type("what is appended", other, IoVector)
        self.views.extend(self._view(view) for view in other.views)

    def split_at(self, length: int) -> tuple[Self, Self]:
        """Two vectors: the first `length` bytes, and the rest.

        Raises:
            OutOfRangeError: `length` is negative or larger than the vector.
            WrongTypeError: It is no int.
        """
        check_type("the length", length, int)
        if not 0 <= length <= len(self):
            raise OutOfRangeError(f"cannot split a vector of {len(self)} bytes at {length}")
        head, tail = split_views(self.views, length)
        return self._of_views(head), self._of_views(tail)

    def split_tail_at(self, length: int) -> Self:
        """Keep the first `length` bytes here and return the rest.

        Raises:
            OutOfRangeError: `length` is negative or larger than the vector.
        """
        head, tail = self.split_at(length)
        self.views = head.views
        return tail

    def copy_into(self, target: Buffer) -> None:
        """Copy all bytes into `target`, which must be writable and just as long.

        Raises:
            OutOfRangeError: The lengths differ.
        """
        view = flat_view(target)
        if view.nbytes != len(self):
            raise OutOfRangeError(f"{len(self)} bytes do not fit a buffer of {view.nbytes}")
        position = 0
        for part in self.views:
            view[position : position + part.nbytes] = part
            position += part.nbytes

    def to_bytes(self) -> bytes:
        """All bytes, joined (a copy)."""
        return b"".join(self.views)

    def is_aligned(self, memory_alignment: int, request_alignment: int) -> bool:
        """Whether O_DIRECT could use the vector as it is.

        Args:
            memory_alignment: Each buffer's address is a multiple of this (bytes).
            request_alignment: Each buffer's length is a multiple of this (bytes).
        """
        return views_aligned(self.views, memory_alignment, request_alignment)


class IoVectorMut(IoVector):
    """A vector of writable buffers: the target of a read.

    Raises:
        WrongTypeError: A buffer is read-only, has no buffer protocol, or is not contiguous.
    """

    __slots__ = ()

    @staticmethod
    def _view(buffer: Buffer) -> memoryview:
        view = flat_view(buffer)
        if view.readonly:
            raise WrongTypeError(
                f"{type(buffer).__name__} is read-only, a read needs a writable buffer"
            )
        return view

    def fill(self, value: int) -> None:
        """Set every byte to `value`.

        Raises:
            OutOfRangeError: `value` is not one of 0 to 255.
            WrongTypeError: It is no int.
        """
        check_type("the value", value, int)
        if value not in range(256):
            raise OutOfRangeError(f"{value!r} is no byte")
        fill_views(self.views, value)

    def copy_from(self, source: Buffer) -> None:
        """Fill the vector with `source`, which must be just as long.

        Raises:
            OutOfRangeError: The lengths differ.
        """
        view = flat_view(source)
        if view.nbytes != len(self):
            raise OutOfRangeError(f"{view.nbytes} bytes do not fill a vector of {len(self)}")
        position = 0
        for part in self.views:
            part[:] = view[position : position + part.nbytes]
            position += part.nbytes


_ZEROES = memoryview(bytes(1 << 16))


def fill_view(view: memoryview, value: int = 0) -> None:
    """Set every byte of the flat `view` to `value`, without a temporary of its size."""
    # A source of 64 KiB stays in the processor's cache, which makes this as fast as memset().
    source = memoryview(bytes([value]) * min(view.nbytes, 1 << 16)) if value else _ZEROES
    step = source.nbytes
    position, end = 0, view.nbytes
    while end - position >= step > 0:
        view[position : position + step] = source
        position += step
    if position < end:
        view[position:] = source[: end - position]


def zero_views(length: int) -> list[memoryview]:
    """Read-only views that hold `length` zero bytes together, all of the same 64 KiB."""
    views = [_ZEROES] * (length // _ZEROES.nbytes)
    rest = length % _ZEROES.nbytes
    if rest:
        views.append(_ZEROES[:rest])
    return views


def fill_views(views: Iterable[memoryview], value: int = 0) -> None:
    """Set every byte of all `views` to `value`."""
    for view in views:
        fill_view(view, value)


def is_address_aligned(view: memoryview, alignment: int) -> bool:
    """Whether the first byte of `view` lies at a multiple of `alignment` bytes in memory.

    The address of read-only memory cannot be asked for; it counts as not aligned.
    """
    if alignment == 1:
        return True
    if view.readonly or not view.nbytes:
        return not view.nbytes
    import ctypes  # only O_DIRECT gets here; a mount without it starts faster

    return ctypes.addressof(ctypes.c_char.from_buffer(view)) % alignment == 0


def views_aligned(
    views: Iterable[memoryview], memory_alignment: int, request_alignment: int
) -> bool:
    """Whether each view's address and length are multiples of the two alignments (bytes)."""
    return all(
        view.nbytes % request_alignment == 0 and is_address_aligned(view, memory_alignment)
        for view in views
    )
