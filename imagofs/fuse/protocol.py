"""The FUSE wire protocol, as far as the data channel speaks it: numbers, structs, pure functions.

A request is a header of 40 bytes and a body; a reply is a header of 16 bytes (total length,
negative errno or 0, the request's `unique`) and a body. All integers are in the machine's byte
order. A message from the file system whose `unique` is 0 is a notification: its code stands where
the errno would be.
"""

from __future__ import annotations

from mmap import PAGESIZE
from struct import Struct
from typing import Final, NamedTuple

__all__ = [
    "COPY_FILE_RANGE_IN",
    "DATA_IN",
    "FALLOCATE_IN",
    "FLUSH_IN",
    "INTERRUPT_IN",
    "IN_HEADER_SIZE",
    "LSEEK_IN",
    "MAX_WRITE",
    "OUT_HEADER",
    "OUT_HEADER_SIZE",
    "REQUEST_SIZE",
    "WRITE_CACHE",
    "WRITE_DATA_OFFSET",
    "WRITE_FLAGS",
    "WRITE_FLAGS_OFFSET",
    "Amendments",
    "amend_init",
    "amend_open",
    "copied_reply",
    "error_reply",
    "invalidate_inode",
    "offered_features",
    "offset_reply",
    "reply_limit",
    "written_reply",
]

# --- opcodes ------------------------------------------------------------------------------------

FORGET: Final = 2
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
FSYNC: Final = 20
GETXATTR: Final = 22
LISTXATTR: Final = 23
FLUSH: Final = 25
INIT: Final = 26
INTERRUPT: Final = 36
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
LSEEK: Final = 46
COPY_FILE_RANGE: Final = 47
COPY_FILE_RANGE_64: Final = 53

# --- sizes, in bytes ----------------------------------------------------------------------------

IN_HEADER_SIZE: Final = 40
OUT_HEADER_SIZE: Final = 16
#: Where the data of a WRITE begin.
WRITE_DATA_OFFSET: Final = 80
WRITE_FLAGS_OFFSET: Final = 60
#: The largest read and write that we negotiate, half of what the kernel would send: a reply of
#: 1 MiB and its header would not go into a pipe of the size that every process may have, and while
#: one half of a larger request is answered, the kernel prepares the other.
MAX_WRITE: Final = 512 << 10
MAX_PAGES: Final = MAX_WRITE // PAGESIZE
#: What a receive buffer must hold: the kernel wants room for headers of 4 KiB beside the data.
REQUEST_SIZE: Final = MAX_WRITE + 4096

# --- structs ------------------------------------------------------------------------------------

#: Header and body of READ and WRITE in one: length, opcode, unique, handle, offset, size. What the
#: header has besides (node, user, group, process) the channel does not need.
DATA_IN = Struct("=IIQ24xQQI")
OUT_HEADER = Struct("=IiQ")  # total length, negative errno, unique
#: What WRITE has besides, at WRITE_FLAGS_OFFSET: WRITE_* flags, and those of open(2).
WRITE_FLAGS = Struct("=I8xI")
_IN_HEADER = Struct("=IIQ")  # total length, opcode, unique

# Bodies, at IN_HEADER_SIZE.
FLUSH_IN = Struct("=Q")  # handle
LSEEK_IN = Struct("=8xQI")  # offset, whence
FALLOCATE_IN = Struct("=8xQQI")  # offset, length, mode
COPY_FILE_RANGE_IN = Struct("=8xQ16xQQ")  # offset to read from, offset to write to, length
INTERRUPT_IN = Struct("=Q")  # unique of the request
_GETXATTR_IN = Struct("=I")  # room for the value
_INIT_IN = Struct("=8xIII")  # max_readahead, flags, flags2
_INIT_IN_SHORT = Struct("=8xII")

# Replies, the header included.
_OFFSET_OUT = Struct("=IiQQ")
_WRITE_OUT = Struct("=IiQI4x")
_INVALIDATE_INODE = Struct("=IiQQqq")
_NOTIFY_INVALIDATE_INODE = 2

# INIT's reply: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write,
# time_gran, max_pages, map_alignment, flags2.
_INIT_OUT = Struct("=IIIIHHIIHHI")
_OPEN_OUT_FLAGS = Struct("=I")
_OPEN_OUT_FLAGS_OFFSET = OUT_HEADER_SIZE + 8

# --- features of INIT (64 bits; the upper half travels in a field of its own) --------------------

ATOMIC_O_TRUNC: Final = 1 << 3
AUTO_INVAL_DATA: Final = 1 << 12
HANDLE_KILLPRIV_V2: Final = 1 << 28
INIT_EXT: Final = 1 << 30
DIRECT_IO_ALLOW_MMAP: Final = 1 << 36

# --- flags of WRITE -----------------------------------------------------------------------------

#: The kernel writes back pages; it does not mind being told that fewer bytes were written.
WRITE_CACHE: Final = 1

# --- flags of OPEN's reply ------------------------------------------------------------------------

FOPEN_NOFLUSH: Final = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES: Final = 1 << 6


class Amendments(NamedTuple):
    """What the channel changes in INIT's reply.

    Attributes:
        wanted: Features that are switched on, where the kernel offers them.
        unwanted: Features that are switched off.
        max_background: Requests that the kernel may have under way without anyone waiting.
    """

    wanted: int
    unwanted: int
    max_background: int


def reply_limit(request: memoryview | bytes) -> int:
    """Bytes that the reply to a forwarded request may have at most, roughly.

    The answers about names and attributes are small; only extended attributes may fill the room
    that the caller offers.
    """
    _, opcode, _ = _IN_HEADER.unpack_from(request)
    if opcode in (GETXATTR, LISTXATTR):
        (room,) = _GETXATTR_IN.unpack_from(request, IN_HEADER_SIZE)
        return 512 + int(room)
    return 512


def offered_features(request: memoryview) -> int:
    """The features that the kernel offers in an INIT request."""
    if len(request) >= IN_HEADER_SIZE + _INIT_IN.size:
        _, flags, flags2 = _INIT_IN.unpack_from(request, IN_HEADER_SIZE)
        return int(flags) | int(flags2) << 32
    _, flags = _INIT_IN_SHORT.unpack_from(request, IN_HEADER_SIZE)
    return int(flags)


def amend_init(reply: memoryview, offered: int, amendments: Amendments) -> int:
    """Change INIT's `reply` in place.

    Args:
        reply: The whole reply, header included.
        offered: What `offered_features` gave for the request.
        amendments: What to change.

    Returns:
        The features that are negotiated now; 0 if the reply is an error, which stays as it is.
    """
    _, error, _ = OUT_HEADER.unpack_from(reply)
    if error or len(reply) < OUT_HEADER_SIZE + _INIT_OUT.size:
        return 0
    (major, minor, readahead, flags, _, _, max_write, gran, max_pages, alignment, flags2) = (
        _INIT_OUT.unpack_from(reply, OUT_HEADER_SIZE)
    )
    features = (flags | flags2 << 32 | amendments.wanted & offered) & ~amendments.unwanted
    if features >> 32 and offered & INIT_EXT:
        features |= INIT_EXT
    background = amendments.max_background
    _INIT_OUT.pack_into(
        reply,
        OUT_HEADER_SIZE,
        major,
        minor,
        readahead,
        features & 0xFFFFFFFF,
        background,
        background * 3 // 4,
        min(max_write, MAX_WRITE),
        gran,
        min(max_pages, MAX_PAGES),
        alignment,
        features >> 32,
    )
    return int(features)


def amend_open(reply: memoryview, flags: int) -> None:
    """Set `flags` (FOPEN_*) in OPEN's `reply`, in place; an error stays as it is."""
    _, error, _ = OUT_HEADER.unpack_from(reply)
    if error or not flags or len(reply) < OUT_HEADER_SIZE + 16:
        return
    (old,) = _OPEN_OUT_FLAGS.unpack_from(reply, _OPEN_OUT_FLAGS_OFFSET)
    _OPEN_OUT_FLAGS.pack_into(reply, _OPEN_OUT_FLAGS_OFFSET, old | flags)


def error_reply(unique: int, number: int) -> bytes:
    """A reply without a body: the errno `number`, or 0 for success."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE, -number, unique)


def written_reply(unique: int, length: int) -> bytes:
    """WRITE's reply, and that of the 32-bit form of COPY_FILE_RANGE: `length` bytes are written."""
    return _WRITE_OUT.pack(24, 0, unique, length)


def offset_reply(unique: int, offset: int) -> bytes:
    """LSEEK's reply."""
    return _OFFSET_OUT.pack(24, 0, unique, offset)


def copied_reply(unique: int, length: int, *, wide: bool) -> bytes:
    """COPY_FILE_RANGE's reply in its 32-bit form, or in the 64-bit one (`wide`)."""
    return offset_reply(unique, length) if wide else written_reply(unique, length)


def invalidate_inode(inode: int, offset: int, length: int) -> bytes:
    """The notification that makes the kernel write back and drop its pages of a range (bytes)."""
    return _INVALIDATE_INODE.pack(40, _NOTIFY_INVALIDATE_INODE, 0, inode, offset, length)
