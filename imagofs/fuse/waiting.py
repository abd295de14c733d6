"""Requests that wait for the image: each is a task of its own, with its own buffer.

They are bounded in number and bytes: at the bound the channel reads no more requests.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from time import perf_counter_ns
from typing import Any

import trio

from . import protocol
from .answers import Answers
from .buffers import BufferPool, ChannelStatistics, MessageBuffer
from .disk import Disk
from .large_replies import LARGE_READ_BYTES
from .protocol import MAX_WRITE, OUT_HEADER_SIZE, REQUEST_SIZE, error_reply

__all__ = ["SPARE_BUFFERS", "Waiting"]

#: Buffers of each kind that are kept for the next request.
SPARE_BUFFERS = 4
#: Tasks that may wait at the same time, and the bytes of their buffers.
_TASK_LIMIT = 512
_TASK_BYTES = 32 << 20
#: A request with no more data than this has a buffer of its size, or is copied, when it has to
#: wait; above it takes a pooled one, or the receive buffer.
_SMALL_BYTES = 128 << 10
_COPY_BYTES = 1 << 20


class Waiting:
    """The tasks of one channel.

    Args:
        disk: The file that the mount shows.
        answers: Where its requests are answered.
        statistics: Where they are counted.
        received: Where the buffers of WRITEs come from, and are given back to.
        direct_io: Whether all reads and writes bypass the kernel's page cache.
    """

    def __init__(
        self,
        disk: Disk,
        answers: Answers,
        statistics: ChannelStatistics,
        received: BufferPool,
        *,
        direct_io: bool,
    ) -> None:
        #: How many tasks there are.
        self.number = 0
        #: Where they run; set it before the first one.
        self.nursery: trio.Nursery
        self._disk = disk
        self._answers = answers
        self._statistics = statistics
        self._received = received
        self._direct_io = direct_io
        self._replies = BufferPool(OUT_HEADER_SIZE, OUT_HEADER_SIZE + MAX_WRITE, SPARE_BUFFERS)
        self._bytes = 0
        self._room = trio.lowlevel.ParkingLot()

    def is_full(self) -> bool:
        """Whether no further request may be read."""
        return self.number >= _TASK_LIMIT or self._bytes >= _TASK_BYTES

    async def one_less(self) -> None:
        """Wait until a task has ended."""
        await self._room.park()

    # --- starting one: plain functions --------------------------------------------------------

    def read(self, unique: int, offset: int, size: int) -> None:
        """Start a READ."""
        self._start(unique, ("read", offset, size), size, self._read, offset, size)

    def write(self, unique: int, data: memoryview, offset: int, buffer: MessageBuffer) -> bool:
        """Start a WRITE whose data are in `buffer`.

        Returns:
            Whether the buffer is the task's by now.
        """
        size = len(data)
        action = ("write", offset, size)
        whole = offset + size > self._disk.size and self._is_whole(buffer)
        if size <= _SMALL_BYTES:
            copied = memoryview(bytes(data))
            self._start(unique, action, size, self._write, copied, offset, whole, None)
            return False
        self._start(unique, action, REQUEST_SIZE, self._write, data, offset, whole, buffer)
        return True

    def _is_whole(self, buffer: MessageBuffer) -> bool:
        """Whether the kernel can do nothing with the answer that a part of a WRITE is written.

        What it writes back from its page cache would be lost without an error, and O_DIRECT, whose
        pieces it sends at the same time, makes EIO of it.
        """
        place = protocol.WRITE_FLAGS_OFFSET
        write_flags, open_flags = protocol.WRITE_FLAGS.unpack_from(buffer.view, place)
        if write_flags & protocol.WRITE_CACHE:
            return True
        return bool(open_flags & os.O_DIRECT) and not self._direct_io

    def other(self, opcode: int, unique: int, request: memoryview) -> bool:
        """Start what is neither READ nor WRITE.

        Returns:
            False: pyfuse3 knows what to do.
        """
        body = protocol.IN_HEADER_SIZE
        start = self._start
        match opcode:
            case protocol.FLUSH:
                (handle,) = protocol.FLUSH_IN.unpack_from(request, body)
                start(unique, ("flush",), 0, self._flush, handle)
            case protocol.FSYNC:
                start(unique, ("sync",), 0, self._sync)
            case protocol.LSEEK:
                offset, whence = protocol.LSEEK_IN.unpack_from(request, body)
                start(unique, ("seek", offset), 0, self._seek, offset, whence)
            case protocol.FALLOCATE:
                offset, length, mode = protocol.FALLOCATE_IN.unpack_from(request, body)
                action = ("allocate or discard", offset, length)
                start(unique, action, 0, self._allocate, mode, offset, length)
            case protocol.COPY_FILE_RANGE | protocol.COPY_FILE_RANGE_64:
                source, target, length = protocol.COPY_FILE_RANGE_IN.unpack_from(request, body)
                wide = opcode == protocol.COPY_FILE_RANGE_64
                action = ("copy", source, length)
                start(unique, action, _COPY_BYTES, self._copy, source, target, length, wide)
            case _:
                return False
        return True

    def _start(
        self,
        unique: int,
        action: tuple[Any, ...],
        held_bytes: int,
        work: Callable[..., Awaitable[None]],
        *arguments: Any,
    ) -> None:
        """Start a task; `held_bytes` is the size of its buffer."""
        self.number += 1
        if self.number > self._statistics.deepest:
            self._statistics.deepest = self.number
        self._bytes += held_bytes
        self.nursery.start_soon(self._run, unique, action, held_bytes, work, arguments)

    # --- the tasks ----------------------------------------------------------------------------

    async def _run(
        self,
        unique: int,
        action: tuple[Any, ...],
        held_bytes: int,
        work: Callable[..., Awaitable[None]],
        arguments: tuple[Any, ...],
    ) -> None:
        started = perf_counter_ns()
        try:
            await work(unique, *arguments)
        except Exception as error:
            self._answers.fail(unique, error, *action)
        finally:
            self.number -= 1
            self._bytes -= held_bytes
            self._statistics.latencies.add(perf_counter_ns() - started)
            self._room.unpark_all()

    async def _read(self, unique: int, offset: int, size: int) -> None:
        access, reply = self._disk.access, self._answers.reply
        lent = await access.lend(offset, size) if size >= LARGE_READ_BYTES else None
        header = protocol.OUT_HEADER.pack(OUT_HEADER_SIZE + size, 0, unique)
        if lent:
            reply(header, lent)
        elif size <= _SMALL_BYTES:
            data = bytearray(size)
            await access.readv((data,), offset)
            reply(header, (data,))
        else:
            pooled = self._replies.take()
            try:
                view, _ = pooled.slice(size)
                await access.readv((view,), offset)
                reply(header, (view,))
            finally:
                self._replies.give_back(pooled)
        self._statistics.reads += 1
        self._statistics.slow_reads += 1
        self._statistics.read_bytes += size

    async def _write(
        self,
        unique: int,
        data: memoryview,
        offset: int,
        whole: bool,
        taken: MessageBuffer | None,
    ) -> None:
        try:
            written = await self._disk.write(data, offset, whole=whole)
            self._answers.reply(protocol.written_reply(unique, written))
            self._statistics.writes += 1
            self._statistics.slow_writes += 1
            self._statistics.write_bytes += written
        finally:
            if taken is not None:
                self._received.give_back(taken)

    async def _flush(self, unique: int, handle: int) -> None:
        await self._disk.flush(handle)
        self._done(error_reply(unique, 0))

    async def _sync(self, unique: int) -> None:
        await self._disk.sync()
        self._done(error_reply(unique, 0))

    async def _seek(self, unique: int, offset: int, whence: int) -> None:
        self._done(protocol.offset_reply(unique, await self._disk.seek(offset, whence)))

    async def _allocate(self, unique: int, mode: int, offset: int, length: int) -> None:
        await self._disk.allocate(mode, offset, length)
        self._done(error_reply(unique, 0))

    async def _copy(self, unique: int, source: int, target: int, length: int, wide: bool) -> None:
        copied = await self._disk.copy(source, target, length)
        self._done(protocol.copied_reply(unique, copied, wide=wide))

    def _done(self, message: bytes) -> None:
        self._statistics.others += 1
        self._answers.reply(message)
