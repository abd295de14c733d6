"""The file that a mount shows: what each request means for the image behind it.

Both ways that requests come in, pyfuse3's handlers and the data channel, end here, so that they
cannot differ. Methods raise `Refusal` with the errno where that is simply the answer, and whatever
the image raises where something failed.

**Holes and dirty pages.** SEEK_DATA and SEEK_HOLE are answered from the mapping of the whole chain,
but the kernel may hold pages that were changed through a shared mmap, or under `writeback`, and not
written back yet; it does not do so before it asks. So while any handle is open for writing, or
`writeback` is on, a range is called a hole only after the kernel was told to write back and drop
its pages of that range (`launder`) and the mapping was looked up again. Where that cannot be asked
(without the data channel) the question does not arrive either.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from itertools import count
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from ..errors import ImagofsError
from ..mapping import RawMapping, ZeroMapping
from .errors import Refusal

if TYPE_CHECKING:
    from ..access import FormatAccess

__all__ = ["Disk", "ImageStatus"]

KEEP_SIZE: Final = 1
PUNCH_HOLE: Final = 2
ZERO_RANGE: Final = 16

#: A COPY_FILE_RANGE copies this much at most, so that it can be interrupted; the caller asks again.
_COPY_LIMIT = 16 << 20
_COPY_CHUNK = 1 << 20
_LOOKUPS_PER_TURN = 64
_SEEK_ATTEMPTS = 16

Launder = Callable[[int, int], Awaitable[None]]


class ImageStatus(NamedTuple):
    """Owner, permission bits and times (nanoseconds) of an image's file."""

    uid: int = 0
    gid: int = 0
    mode: int = 0o600
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0


class Disk:
    """An open image as the one file of a mount.

    Args:
        access: The image.
        writable: Whether the mount is; needs a writable image.
        writeback: Whether the kernel keeps written pages back (`-o writeback`).
    """

    def __init__(self, access: FormatAccess, *, writable: bool, writeback: bool = False) -> None:
        self.access = access
        self.writable = writable
        self.writeback = writeback and writable
        #: Makes the kernel write back and drop its pages of (guest_offset, length).
        self.launder: Launder | None = None
        # A raw layer's holes are those of its file; other formats say themselves what they map.
        raw = (layer for layer in access.layers() if layer.format_name == "raw")
        self._sparse = frozenset(storage for layer in raw for storage in layer.storages)
        self._handles = count(1)
        self._writing_handles: set[int] = set()
        self._writes: set[int] = set()
        self._write_tickets = count()
        self._write_ended = trio.lowlevel.ParkingLot()
        self._growing = trio.Lock()

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self.access.size()

    def blocks(self) -> int:
        """Allocated space in blocks of 512 bytes, never more than a file without holes has."""
        return min(self.access.allocated_bytes() // 512, -(-self.size // 512))

    def image_status(self) -> ImageStatus:
        """What the top image's own file says of itself; a plain default where it has no file."""
        fileno = getattr(self.access.driver.storages[0], "fileno", None)
        if fileno is None:
            return ImageStatus()
        found = os.fstat(fileno())
        return ImageStatus(
            uid=found.st_uid,
            gid=found.st_gid,
            mode=found.st_mode & 0o777,
            atime_ns=found.st_atime_ns,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns,
        )

    # --- handles ------------------------------------------------------------------------------

    def open(self, flags: int) -> int:
        """A new handle for open(2) with `flags`.

        O_TRUNC is among them without the channel only; with it, it comes as `truncate`. Once it is
        answered, the kernel takes the file for empty until it asks for the size: it drops what was
        changed through a mapping, and under writeback writes zeroes around what comes next.

        Raises:
            Refusal: EROFS, for writing on a read-only mount. ETXTBSY, for O_TRUNC while the kernel
                may hold changed pages.
        """
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        truncates = bool(flags & os.O_TRUNC)
        if writes or truncates:
            self.check_writable()
        if truncates and self.may_have_dirty_pages:
            raise Refusal(errno.ETXTBSY)
        handle = next(self._handles)
        if writes:
            self._writing_handles.add(handle)
        return handle

    def release(self, handle: int) -> None:
        """Forget a handle."""
        self._writing_handles.discard(handle)

    @property
    def may_have_dirty_pages(self) -> bool:
        """Whether the kernel may hold pages that were changed and not written back."""
        return self.writeback or bool(self._writing_handles)

    # --- data ---------------------------------------------------------------------------------

    def clip(self, guest_offset: int, length: int) -> int:
        """Bytes of a read that lie before the end."""
        return max(0, min(length, self.size - guest_offset))

    async def read(self, view: memoryview, guest_offset: int) -> None:
        """Fill `view`, whose range was clipped."""
        if view.nbytes and not self.access.read_nowait(view, guest_offset):
            await self.access.readv((view,), guest_offset)

    async def write(self, view: memoryview, guest_offset: int, *, whole: bool = False) -> int:
        """Write `view`; what lies past the end is left out, as on a block device.

        Args:
            view: The data.
            guest_offset: Where they go to, in bytes.
            whole: To be told that something was left out takes an error.

        Returns:
            Bytes written, above zero.

        Raises:
            Refusal: EROFS, or ENOSPC for a write that begins at or past the end, or of which
                something was left out if it has to be `whole`.
        """
        self.check_writable()
        length = self.clip(guest_offset, view.nbytes)
        if not length:
            if not view.nbytes:
                return 0
            raise Refusal(errno.ENOSPC)
        ticket = next(self._write_tickets)
        self._writes.add(ticket)
        try:
            await self.access.writev((view[:length],), guest_offset)
        finally:
            self._writes.discard(ticket)
            self._write_ended.unpark_all()
        if whole and length < view.nbytes:
            raise Refusal(errno.ENOSPC)
        return length

    async def flush(self, handle: int) -> None:
        """What close(2) of a handle waits for: everything is in the image file, metadata included.

        If that fails, those who opened it for writing are told. Whoever only read has lost nothing,
        and what could not be written is tried, and told, the next time.
        """
        if not self.writable:
            return
        try:
            await self.access.flush()
        except ImagofsError:
            if handle in self._writing_handles:
                raise

    async def sync(self) -> None:
        """What fsync(2) waits for: everything is durable."""
        if self.writable:
            await self.access.sync()

    async def truncate(self, size: int, *, by_name: bool) -> None:
        """Answer a request to set the size in bytes.

        A disk does not shrink here. open(2) with O_TRUNC, which cannot be told from truncate(2)
        to 0 bytes (`by_name`), leaves it alone, as it does with a block device.

        Raises:
            Refusal: EROFS, or EPERM for a smaller size.
        """
        self.check_writable()
        current = self.size
        if size > current:
            await self._grow(size)
        elif size < current and not (by_name and size == 0):
            raise Refusal(errno.EPERM)

    async def _grow(self, size: int) -> None:
        """Grow to `size`, unless somebody else has made it larger still meanwhile."""
        async with self._growing:
            if size > self.size:
                await self.access.resize(size)

    def check_writable(self) -> None:
        """Raise Refusal (EROFS) on a read-only mount."""
        if not self.writable:
            raise Refusal(errno.EROFS)

    # --- holes --------------------------------------------------------------------------------

    async def seek(self, guest_offset: int, whence: int) -> int:
        """Answer SEEK_DATA or SEEK_HOLE; see the module's text about dirty pages.

        Raises:
            Refusal: ENXIO at or past the end, or where no data follow.
        """
        size = self.size
        if not 0 <= guest_offset < size:
            raise Refusal(errno.ENXIO)
        if whence == os.SEEK_DATA:
            found = await self._seek_data(guest_offset, size)
            if found >= size:
                raise Refusal(errno.ENXIO)
            return found
        if whence == os.SEEK_HOLE:
            return await self._seek_hole(guest_offset, size)
        raise Refusal(errno.EINVAL)

    async def _seek_data(self, guest_offset: int, size: int) -> int:
        found = await self._next_data(guest_offset, size)
        if found > guest_offset and self.may_have_dirty_pages:
            if not await self._launder(guest_offset, found - guest_offset):
                return guest_offset
            # Only up to `found` nothing is dirty any more.
            found = min(found, await self._next_data(guest_offset, size))
        return found

    async def _seek_hole(self, guest_offset: int, size: int) -> int:
        position = guest_offset
        for _ in range(_SEEK_ATTEMPTS):
            start, end = await self._next_hole(position, size)
            if start == size or not self.may_have_dirty_pages:
                return start
            if not await self._launder(start, end - start):
                return size
            position, until = await self._next_hole(start, size)
            if position < min(until, end):
                return position
        return size  # written to all the time: everything counts as data

    async def _next_data(self, guest_offset: int, size: int) -> int:
        """Where data begin at or after `guest_offset`; `size` if there are none."""
        lookups = 0
        while guest_offset < size:
            is_hole, length = await self._look(guest_offset, size)
            if not is_hole:
                break
            guest_offset += length
            lookups = await _breathe(lookups)
        return guest_offset

    async def _next_hole(self, guest_offset: int, size: int) -> tuple[int, int]:
        """Start and end of the first (part of a) hole at or after `guest_offset`."""
        lookups = 0
        while guest_offset < size:
            is_hole, length = await self._look(guest_offset, size)
            if is_hole:
                return guest_offset, guest_offset + length
            if not length:  # the end, should the disk have shrunk meanwhile
                break
            guest_offset += length
            lookups = await _breathe(lookups)
        return size, size

    async def _look(self, guest_offset: int, size: int) -> tuple[bool, int]:
        """Whether a hole is at `guest_offset`, and for how many bytes that holds."""
        mapping = await self.access.get_mapping(guest_offset, size - guest_offset)
        if isinstance(mapping, RawMapping) and mapping.storage in self._sparse:
            is_data, end = await mapping.storage.extent_at(mapping.offset)
            return not is_data, min(mapping.length, end - mapping.offset)
        return isinstance(mapping, ZeroMapping), mapping.length

    async def _launder(self, guest_offset: int, length: int) -> bool:
        """Have dirty pages of a range written to the image; False if that cannot be asked."""
        if self.launder is None:
            return False
        try:
            await self.launder(guest_offset, length)
        except OSError:
            return False
        # Pages that the kernel had begun to write back before: wait for those writes.
        begun = set(self._writes)
        while self._writes & begun:
            await self._write_ended.park()
        return True

    # --- space ----------------------------------------------------------------------------------

    async def allocate(self, mode: int, guest_offset: int, length: int) -> None:
        """Answer fallocate(2): punch a hole, zero a range, or preallocate; grow where it may.

        Zeroing takes no space that a range does not have yet. What lies past the end is nothing
        to punch or to zero, and no space can be kept for it.

        Raises:
            Refusal: EROFS, or EOPNOTSUPP for another mode.
        """
        self.check_writable()
        what = mode & ~KEEP_SIZE
        if what not in (0, PUNCH_HOLE, ZERO_RANGE) or mode == PUNCH_HOLE:
            raise Refusal(errno.EOPNOTSUPP)
        end = guest_offset + length
        if end > self.size:
            if mode == KEEP_SIZE:
                raise Refusal(errno.EOPNOTSUPP)
            if mode & KEEP_SIZE:
                end = self.size
            else:
                await self._grow(end)
        if guest_offset >= end:
            return
        if what == PUNCH_HOLE:
            await self.access.discard_to_zero(guest_offset, end - guest_offset)
        elif what == ZERO_RANGE:
            await self.access.write_zeroes(guest_offset, end - guest_offset)
        else:
            await self._preallocate(guest_offset, end)

    async def _preallocate(self, guest_offset: int, end: int) -> None:
        # Not by writing zeroes into holes: pages that are written back meanwhile would be lost.
        while guest_offset < end:
            mapping = await self.access.ensure_data_mapping(guest_offset, end - guest_offset)
            guest_offset += mapping.length
            await trio.lowlevel.checkpoint()

    async def copy(self, source: int, target: int, length: int) -> int:
        """Answer copy_file_range(2) within the disk: guest offsets and a length in bytes.

        Holes stay holes. Cancelled, it has copied a part.

        Returns:
            Bytes copied: perhaps fewer than asked, 0 if `source` is at or past the end.

        Raises:
            Refusal: EROFS, or ENOSPC if `target` is at or past the end.
            ImagofsError: Nothing could be copied. What fails later is told the next time.
        """
        self.check_writable()
        length = self.clip(source, min(length, _COPY_LIMIT))
        if length and target >= self.size:
            raise Refusal(errno.ENOSPC)
        length = self.clip(target, length)
        if length and self.may_have_dirty_pages:
            await self._launder(source, length)
        buffer = memoryview(bytearray(min(length, _COPY_CHUNK)))
        copied = 0
        while copied < length:
            try:
                part = await self._copy(source + copied, target + copied, length - copied, buffer)
            except ImagofsError:
                if not copied:
                    raise
                break
            if not part:
                break
            copied += part
            await trio.lowlevel.checkpoint()
        return copied

    async def _copy(self, source: int, target: int, length: int, buffer: memoryview) -> int:
        """Copy a part of a range, through `buffer`. Returns its bytes: 0 where the disk ends."""
        mapping = await self.access.get_mapping(source, length)
        if isinstance(mapping, ZeroMapping):
            await self.access.discard_to_zero(target, mapping.length)
            return mapping.length
        part = min(mapping.length, len(buffer))
        if part:
            await self.access.readv((buffer[:part],), source)
            await self.access.writev((buffer[:part],), target)
        return part


async def _breathe(lookups: int) -> int:
    """Let others run now and then: lookups in cached tables do not wait by themselves."""
    if lookups % _LOOKUPS_PER_TURN == _LOOKUPS_PER_TURN - 1:
        await trio.lowlevel.checkpoint()
    return lookups + 1
