"""System calls on descriptors of files and block devices, for worker threads.

Short transfers are continued, vectors longer than the system takes are split, and what Python has
no function for is called through ctypes, which is imported when it is first needed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

from ..vectors import zero_views

__all__ = [
    "IOV_MAX",
    "UNSUPPORTED",
    "addressable",
    "block_discard",
    "block_zero",
    "direct_alignments",
    "extent_at",
    "is_read_only_device",
    "logical_block_size",
    "map_untouchable",
    "mincore",
    "punch_hole",
    "read_full",
    "start_write_out",
    "unmap",
    "write_full",
    "write_zero_bytes",
    "zero_range",
]

#: Buffers that one vectored call takes.
IOV_MAX = os.sysconf("SC_IOV_MAX")

#: What system calls say that a file system or device does not know.
UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY})

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_FALLOC_FL_ZERO_RANGE = 0x10
_SYNC_FILE_RANGE_WRITE = 2
_BLKROGET = 0x125E
_BLKSSZGET = 0x1268
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_STATX_DIO_MEM_ALIGN_OFFSET = 0x98  # and stx_dio_offset_align behind it, 32 bits each

_ZERO_STEP = 1 << 20

_MAP_FAILED = (1 << 8 * struct.calcsize("P")) - 1

_libc: Any = None


def read_full(
    fd: int, views: Sequence[memoryview], offset: int, wanted: int, alignment: int = 1
) -> int:
    """Fill `views` from `offset` until at least `wanted` bytes are there or the file ends.

    Args:
        fd: The descriptor.
        views: Flat writable views.
        offset: Where to start, in bytes.
        wanted: Bytes needed; `views` may have room for more.
        alignment: A short read that is no multiple of this has met the end (O_DIRECT could not go
            on from there).

    Returns:
        Bytes filled.

    Raises:
        OSError: The system refused.
    """
    done = os.preadv(fd, views, offset) if len(views) <= IOV_MAX else 0
    if done >= wanted:
        return done
    rest = _behind([*views], done)
    while done < wanted and not done % alignment:
        got = os.preadv(fd, rest[:IOV_MAX], offset + done)
        if not got:
            break
        done += got
        rest = _behind(rest, got)
    return done


def write_full(fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Write all of `views` at `offset`.

    Raises:
        OSError: The system refused; a part may be written.
    """
    rest = _behind([*views], 0)
    while rest:
        done = os.pwritev(fd, rest[:IOV_MAX], offset)
        if not done:
            raise OSError(errno.EIO, "nothing was written")
        offset += done
        rest = _behind(rest, done)


def write_zero_bytes(fd: int, offset: int, length: int) -> None:
    """Write `length` zero bytes at `offset`.

    Raises:
        OSError: The system refused; a part may be written.
    """
    end = offset + length
    while offset < end:
        step = min(end - offset, _ZERO_STEP)
        write_full(fd, zero_views(step), offset)
        offset += step


def _behind(views: list[memoryview], done: int) -> list[memoryview]:
    """Take the first `done` bytes out of `views`, and empty views that come next."""
    index = 0
    while index < len(views) and done >= views[index].nbytes:
        done -= views[index].nbytes
        index += 1
    del views[:index]
    if done:
        views[0] = views[0][done:]
    return views


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make the range of a file or block device read as zero and give its space back.

    The size stays.

    Raises:
        OSError: EOPNOTSUPP where the file system or device cannot; or what it met.
    """
    _fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make the range of a file read as zero and reserve its space. The file grows if needed.

    Raises:
        OSError: EOPNOTSUPP where the file system cannot; or what it met.
    """
    _fallocate(fd, _FALLOC_FL_ZERO_RANGE, offset, length)


def start_write_out(fd: int) -> None:
    """Have the device begin to write what the page cache holds of a file, without waiting for it.

    What fails is told by the next fdatasync(), as if that had begun it.
    """
    libc = _load_libc()
    import ctypes

    libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def extent_at(fd: int, offset: int, size: int) -> tuple[bool, int]:
    """Whether a file of `size` bytes has data at `offset`, else a hole; and where that ends.

    Where the file has become shorter than that counts as data: a read has to say so.

    Raises:
        OSError: What the file system met.
    """
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
        if data > offset:
            return False, min(data, size)
        return True, max(min(os.lseek(fd, offset, os.SEEK_HOLE), size), offset + 1)
    except OSError as error:
        if error.errno == errno.ENXIO:
            end = min(os.lseek(fd, 0, os.SEEK_END), size)
            return (False, end) if offset < end else (True, size)
        if error.errno == errno.EINVAL or error.errno in UNSUPPORTED:
            return True, size
        raise


def block_discard(fd: int, offset: int, length: int) -> None:
    """Discard the range of a block device.

    Raises:
        OSError: EOPNOTSUPP where the device cannot; or what it met.
    """
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", offset, length))


def block_zero(fd: int, offset: int, length: int) -> None:
    """Make the range of a block device read as zero, without giving its space back.

    Raises:
        OSError: What the device met.
    """
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))


def is_read_only_device(fd: int) -> bool:
    """Whether a block device refuses writes: open(2) lets everybody open it for writing."""
    (read_only,) = struct.unpack("=i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))
    return bool(read_only)


def logical_block_size(fd: int) -> int:
    """What requests to a block device count in, in bytes."""
    (size,) = struct.unpack("=i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))
    return int(size)


def direct_alignments(fd: int) -> tuple[int, int]:
    """What O_DIRECT demands of a descriptor that has it.

    Returns:
        Alignment of buffers in memory; alignment of offsets and lengths (bytes).
    """
    return _stated_alignments(fd) or _tried_alignments(fd)


def _stated_alignments(fd: int) -> tuple[int, int] | None:
    """The alignments, where statx() knows them (Linux 6.1 and later, most file systems)."""
    libc = _load_libc()
    if not hasattr(libc, "statx"):
        return None
    import ctypes

    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer):
        return None
    (mask,) = struct.unpack_from("=I", buffer, 0)
    if not mask & _STATX_DIOALIGN:
        return None
    memory, request = struct.unpack_from("=II", buffer, _STATX_DIO_MEM_ALIGN_OFFSET)
    return (memory, request) if memory and request else None


def _tried_alignments(fd: int) -> tuple[int, int]:
    """The alignments found by reading; the page's size where nothing tells them apart."""
    room = memoryview(mmap.mmap(-1, 4 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    candidates = (1, 512, 1024, 2048)

    def works(memory: int, request: int) -> bool:
        try:
            # A read of nothing (at the end of a short file) proves nothing.
            return os.preadv(fd, [room[memory : memory + request]], request) > 0
        except OSError:
            return False

    page = mmap.PAGESIZE
    request = next((step for step in candidates if works(page, step)), page)
    memory = next((step for step in candidates if works(step, request)), page)
    return memory, request


def addressable(length: int) -> tuple[bytearray, int]:
    """A buffer of `length` bytes, and its address for `mincore`; it never moves."""
    import ctypes

    buffer = bytearray(length)
    return buffer, ctypes.addressof((ctypes.c_char * length).from_buffer(buffer))


def map_untouchable(fd: int, length: int) -> int | None:
    """Map the first `length` bytes of a file, past its end too, without any right to touch them.

    Returns:
        The address, for `mincore` and `unmap`; None if the system refuses.
    """
    libc = _load_libc()
    import ctypes

    mmap64 = getattr(libc, "mmap64", libc.mmap)  # with 64-bit offsets wherever there are two
    mmap64.restype = ctypes.c_void_p
    no_right, anywhere = 0, None
    address = mmap64(
        anywhere, ctypes.c_size_t(length), no_right, mmap.MAP_SHARED, fd, ctypes.c_int64(0)
    )
    return None if address is None or address == _MAP_FAILED else int(address)


def unmap(address: int, length: int) -> None:
    """Undo `map_untouchable`."""
    import ctypes

    _load_libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(length))


def mincore() -> Callable[[int, int, int], int]:
    """mincore(2), for ranges of what `map_untouchable` gave; it returns 0 if it went well.

    It takes where the range begins, at a page boundary, its bytes, and the address of a buffer with
    a byte for each page, which becomes 1 or 0.
    """
    import ctypes

    foreign = _load_libc().mincore
    foreign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    function: Callable[[int, int, int], int] = foreign
    return function


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    libc = _load_libc()
    import ctypes

    # The one with 64-bit offsets wherever there are two.
    fallocate = getattr(libc, "fallocate64", libc.fallocate)
    start, size = ctypes.c_int64(offset), ctypes.c_int64(length)
    while fallocate(fd, mode, start, size):
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def _load_libc() -> Any:
    """The C library."""
    global _libc
    if _libc is None:
        import ctypes

        _libc = ctypes.CDLL(None, use_errno=True)
    return _libc
