"""Zeroes and discards by system calls, on files and block devices that know them."""

from __future__ import annotations

import errno
import os

from . import syscalls

__all__ = ["SpaceCalls"]


class SpaceCalls:
    """What gives space back and makes ranges zero without writing them. For worker threads.

    What the file system or device turns out not to know is not asked for again.

    Args:
        fd: A descriptor without O_DIRECT. The caller keeps it open.
        is_block_device: Whether it is a block device, else a regular file.
    """

    __slots__ = ("_can_discard", "_can_punch", "_can_zero", "_fd", "_is_block_device")

    def __init__(self, fd: int, is_block_device: bool) -> None:
        self._fd = fd
        self._is_block_device = is_block_device
        self._can_punch = self._can_zero = self._can_discard = True

    def zero(self, offset: int, length: int, allocated: bool) -> bool:
        """Make the range read as zero; a file that ends before the range's end grows up to it.

        Args:
            offset: Where the range begins, in bytes; for a device a multiple of its block.
            length: Its length in bytes; for a device a multiple of its block.
            allocated: The range keeps its space, or gets it.

        Returns:
            False if zeroes have to be written instead.

        Raises:
            OSError: What the file system or device met.
        """
        if not allocated and self._can_punch and self._punch(offset, length):
            return True
        return self._can_zero and self._zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Give the range's space back, or do nothing where that is unknown.

        Raises:
            OSError: What the file system or device met.
        """
        if not self._can_discard:
            return
        call = syscalls.block_discard if self._is_block_device else syscalls.punch_hole
        try:
            call(self._fd, offset, length)
        except OSError as error:
            if error.errno in syscalls.UNSUPPORTED:
                self._can_discard = False
            elif not self._is_busy(error):
                raise

    def _punch(self, offset: int, length: int) -> bool:
        try:
            syscalls.punch_hole(self._fd, offset, length)
        except OSError as error:
            if error.errno in syscalls.UNSUPPORTED:
                self._can_punch = False
            elif not self._is_busy(error):
                raise
            return False
        if not self._is_block_device and os.fstat(self._fd).st_size < offset + length:
            # Grow by writing a byte of our own range: ftruncate() could cut off what another
            # thread appended in between.
            os.pwrite(self._fd, b"\0", offset + length - 1)
        return True

    def _zero(self, offset: int, length: int) -> bool:
        call = syscalls.block_zero if self._is_block_device else syscalls.zero_range
        try:
            call(self._fd, offset, length)
        except OSError as error:
            if error.errno in syscalls.UNSUPPORTED:
                self._can_zero = False
            elif not self._is_busy(error):
                raise
            return False
        return True

    def _is_busy(self, error: OSError) -> bool:
        """Whether the device is in use (mounted, say), and refuses this way of changing it only."""
        return self._is_block_device and error.errno == errno.EBUSY
