"""The data channel: what stands between the kernel's /dev/fuse and pyfuse3's session.

The channel keeps the real descriptor, and puts a socket where pyfuse3 reads its session. It answers
READ, WRITE, FLUSH, FSYNC, LSEEK, FALLOCATE and COPY_FILE_RANGE by itself, and passes every other
request on (`forwarding.py`).

Rules that live here:

- `Channel._drain` is a plain function: it answers requests in a burst, each with one read of the
  descriptor, one `read_nowait` or `write_nowait` of the image and one write, and never waits for
  the image. The data of a large READ are not copied here: they go from the page cache through a
  pipe (`large_replies.py`), or from where the image keeps what it inflated. What cannot be answered
  like this becomes a task of its own (`waiting.py`).
- Of an image that nobody writes to, one large reply at a time is the kernel's (`reply_ring.py`), as
  long as the page cache has what was looked for: what waits for a device is better off in a task.
  While nothing is to be done, the data of those are gathered that are expected to be ours next
  (`replies_ahead.py`).
- While replies are in pipes, nothing is done to a writable image: they refer to its pages.
- What the second thread is given of large WRITEs (`large_writes.py`) is done before a burst ends:
  meanwhile READs and WRITEs are answered, and no task runs.
- While somebody waits for one reply after another, idle processors are kept from sleeping if that
  gains something (`wakefulness.py`), until nothing has come for a moment.
- Small replies are held back for a moment while requests are queuing, never while nothing is to be
  done (`_BUSY_STREAK`).
- An interrupted request is finished as if it had not been, as a disk does it.
- Nothing is answered with ENOSYS: the kernel would not ask again.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from functools import partial
from time import monotonic, perf_counter_ns
from typing import TYPE_CHECKING, Final

import trio

from . import protocol
from .answers import ENDED, Answers
from .buffers import BufferPool, ChannelStatistics, MessageBuffer
from .disk import Disk
from .forwarding import Forwarder
from .large_replies import LARGE_READ_BYTES, LargeReplies
from .large_writes import LargeWrite, LargeWrites
from .protocol import (
    MAX_WRITE,
    OUT_HEADER_SIZE,
    READ,
    REQUEST_SIZE,
    WRITE,
    WRITE_DATA_OFFSET,
)
from .reply_ring import ReplyRing, open_reply_ring
from .second_thread import SecondThread
from .statistics import SAMPLE_EVERY
from .waiting import SPARE_BUFFERS, Waiting
from .wakefulness import Wakefulness

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..reading import FileRange

__all__ = ["Channel"]

#: Work that one burst may do before others get a turn: a request counts 1, and 1 for each 256 KiB.
_BUDGET = 64
_BUDGET_SHIFT = 18
#: Once this many large READs in turn were in the page cache, the next are handed to the kernel
#: without looking.
_CACHED_IN_TURN = 4
_SETTLE_SECONDS = 0.001  # between looks, at the end
#: A WRITE of at least this much is done in the second thread, if another request is there.
_LARGE_WRITE_BYTES = 256 << 10
#: To wake somebody costs more than to answer. So, once this many requests in turn were there when
#: the descriptor was looked at, small replies are held back and sent together: whoever is woken by
#: the first finds the others, too. They are sent at once when nothing more is there to be done.
_BUSY_STREAK = 3
_MOST_HELD = 8
_HELD_BYTES = 16 << 10  # of data in one reply
_HELD_NANOSECONDS = 100_000  # after the first, when another one joins it
#: How often the descriptor is looked at before the channel sleeps; and how long it then sleeps
#: without giving up the thread, while no task is waiting (milliseconds).
_SPIN = 40 if len(os.sched_getaffinity(0)) > 1 else 0
_SLEEP_MILLISECONDS = 2
#: Looking was in vain this often in turn: sleep at once, until a sleep was shorter than this
#: (seconds). On a busy machine who looks takes the processor from who would send the request.
_VAIN_SPINS = 4
_SHORT_SLEEP = 0.0001

#: Of a request's number, which goes up by 2: the bits that are zero if it is timed.
_SAMPLE_MASK = 2 * SAMPLE_EVERY - 2

# What a burst ended with.
_IDLE: Final = 0  # nothing more to read now
_MORE: Final = 1  # its budget is used up
_FULL: Final = 2  # too much is waiting
_GONE: Final = 3  # the kernel ended the connection

#: None of these has a reply; the two inodes are never forgotten.
_UNANSWERED = frozenset({protocol.INTERRUPT, protocol.FORGET, protocol.BATCH_FORGET})

#: Errors of a read after which the next one is tried: a signal, an aborted request.
_TRANSIENT = frozenset({errno.EINTR, errno.ENOENT})


class Channel:
    """The channel of one mount.

    Args:
        session_fd: pyfuse3's session descriptor, an open /dev/fuse. The channel takes its place
            until `give_back`.
        disk: The file that the mount shows.
        inode: Its inode number.
        amendments: What to change in INIT's reply.
        direct_io: Whether all reads and writes bypass the kernel's page cache.
        open_flags: FOPEN_* flags to add to OPEN's replies.
        wakefulness: What keeps processors awake, held while this serves at most; None: nothing.
        negotiated: Called with the features once INIT was answered: the mount answers from then on.
    """

    def __init__(
        self,
        session_fd: int,
        disk: Disk,
        *,
        inode: int,
        amendments: protocol.Amendments,
        direct_io: bool,
        open_flags: int,
        wakefulness: Wakefulness | None,
        negotiated: Callable[[int], None],
    ) -> None:
        self.statistics = ChannelStatistics()
        self._disk = disk
        self._inode = inode

        self._session_fd = session_fd
        self._fd = os.dup(session_fd)
        os.set_blocking(self._fd, False)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._answers = answers = Answers(self._fd)
        self._forwarder = Forwarder(
            session_fd,
            reply=answers.reply,
            fail=lambda unique, error: answers.fail(unique, error, "pass on a request"),
            amendments=amendments,
            open_flags=open_flags,
            negotiated=negotiated,
        )

        self._requests = BufferPool(WRITE_DATA_OFFSET, REQUEST_SIZE, SPARE_BUFFERS)
        self._request = self._requests.take()
        self._reply_buffers = [
            MessageBuffer(OUT_HEADER_SIZE, OUT_HEADER_SIZE + MAX_WRITE) for _ in range(_MOST_HELD)
        ]
        self._waiting = Waiting(disk, answers, self.statistics, self._requests, direct_io=direct_io)
        self._second = SecondThread()
        self._large = LargeReplies(self._fd, self._second, answers.not_sent)
        self._ring = (
            None
            if disk.writable
            else open_reply_ring(
                self._fd,
                failed=self._ring_failed,
                not_sent=answers.not_sent,
            )
        )
        self._cached_replies = 0  # in turn, as far as was looked
        self._large_writes = LargeWrites(
            self._second,
            written=self._large_is_written,
            finished=self._large_is_finished,
        )
        self._wakefulness = wakefulness
        self._alone = 0  # requests since the last that was timed that came when all was done
        self._owes_sample = False  # a request that should have been timed was not
        self._spin = _SPIN
        self._vain_spins = 0
        # Its own: those threads wait for WRITEs, which may wait for threads of the default one.
        self._launderers = trio.CapacityLimiter(8)
        self._laundering = 0  # tasks that wait for them
        self._until_laundered: trio.CancelScope | None = None
        disk.launder = self._launder

    # --- the loop -----------------------------------------------------------------------------

    async def serve(self) -> None:
        """Answer requests until the kernel ends the connection, or `stop` is called.

        Every request that was read is answered before it returns, those at pyfuse3 included.
        """
        self._scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            self._waiting.nursery = nursery
            self._watching = trio.CancelScope()
            if self._ring:
                nursery.start_soon(self._watch_ring, self._ring)
            try:
                with self._scope:
                    await self._answer()
                self._disk.launder = None
                if self._laundering:
                    # The kernel writes back for it, and would wait for ever: not even a signal
                    # helps.
                    with trio.CancelScope() as self._until_laundered:
                        await self._answer()
            finally:
                self._let_processors_sleep()
                await self._settle_ring()
        self._large.settle()
        await self._forwarder.settle()

    async def _settle_ring(self) -> None:
        """Return when the kernel sends no reply by itself any more.

        Whatever ends the channel: files are closed next, and the kernel goes by their numbers.
        """
        self._watching.cancel()
        with trio.CancelScope(shield=True):
            while self._ring and self._ring.under_way:
                self._ring.reap()
                await trio.sleep(_SETTLE_SECONDS)

    async def _answer(self) -> None:
        """Answer requests until the kernel ends the connection."""
        while (outcome := self._drain()) != _GONE:
            if outcome == _IDLE:
                if self._ring:
                    self._ring.ahead.forget()
                await self._readable()
            elif outcome == _FULL:
                self._let_processors_sleep()
                await self._waiting.one_less()
            else:
                await trio.lowlevel.checkpoint()

    async def _readable(self) -> None:
        """Return when there is a request; if none comes for a moment, processors may sleep."""
        if self._wakefulness and self._wakefulness.is_held:
            with trio.move_on_after(_SLEEP_MILLISECONDS / 1000):
                await trio.lowlevel.wait_readable(self._fd)
                return
            self._wakefulness.let_go()
        await trio.lowlevel.wait_readable(self._fd)

    def _let_processors_sleep(self) -> None:
        if self._wakefulness:
            self._wakefulness.let_go()

    def stop(self) -> None:
        """Read no further request, but those that a request waits for."""
        self._scope.cancel()

    @property
    def awake_seconds(self) -> float:
        """For how long idle processors were kept awake."""
        return self._wakefulness.seconds if self._wakefulness else 0.0

    @property
    def queue_depth(self) -> int:
        """Requests that wait for the image."""
        return self._waiting.number

    def _drain(self) -> int:
        """Answer requests until there are none, or others should get a turn."""
        waiting = self._waiting
        if waiting.is_full():
            return _FULL
        # Every attribute that is looked up once more per request can be measured here.
        fd = self._fd
        readv, write = os.readv, os.write
        unpack, pack = protocol.DATA_IN.unpack_from, protocol.OUT_HEADER.pack_into
        written_reply = protocol.written_reply
        answers = self._answers
        reply_each, fail = answers.reply_each, answers.fail
        read_nowait = self._disk.access.read_nowait
        write_nowait = self._disk.access.write_nowait
        send_large = self._send_large
        disk_size = self._disk.size
        writable = self._disk.writable
        forwarded = self._forwarder.under_way
        buffers = self._reply_buffers
        reply = buffers[0]
        held: list[Buffer] = []
        message: Buffer | None
        streak = send_at = 0
        large = self._large
        in_pipes = large.is_sending  # replies that are not sent yet
        sender = self._ring
        ahead = sender.ahead if sender else None
        under_way = sender.under_way if sender else ()
        large_writes = self._large_writes
        handed = False  # whether a WRITE was handed over
        request = self._request
        view = request.view
        vector = (view,)
        reads = read_bytes = writes = write_bytes = 0
        add_latency = self.statistics.latencies.add
        spins = started = 0
        owed = here = self._owes_sample
        wakefulness = self._wakefulness
        alone = self._alone
        budget = _BUDGET
        try:
            while budget > 0:
                try:
                    length = readv(fd, vector)
                except BlockingIOError:
                    streak = 0
                    if handed and large_writes.finish_if_done():
                        handed = False
                        continue
                    if held:
                        reply_each(held)
                        reply = buffers[0]
                        continue
                    if under_way and sender and sender.reap():
                        self._cached_replies = 0
                    if in_pipes:
                        found = large.finish()
                        in_pipes = writable and large.is_sending
                        if found:
                            continue
                    if waiting.number or forwarded:
                        return _IDLE
                    if ahead and ahead.is_wanted:
                        ahead.fill(self._expected_ranges)
                        continue
                    spins += 1
                    if spins > self._spin:
                        if not self._sleep():
                            return _IDLE
                        spins = 0
                        alone += 1
                        budget -= 1
                    continue
                except OSError as error:
                    if error.errno in ENDED:
                        return _GONE
                    if error.errno not in _TRANSIENT:
                        raise
                    budget -= 1
                    continue
                if spins:
                    spins = self._vain_spins = 0
                    alone += 1
                streak += 1
                budget -= 1
                _, opcode, unique, _, offset, size = unpack(view)
                if timed := owed or not unique & _SAMPLE_MASK:
                    here, owed = owed, False
                    started = perf_counter_ns()
                    if wakefulness and not here:
                        wakefulness.span(started, SAMPLE_EVERY, alone)
                        alone = 0
                if in_pipes:
                    if writable and opcode != READ:
                        large.settle()
                        in_pipes = False
                    else:
                        large.hand_over()
                if opcode == READ:
                    if offset + size > disk_size:
                        size = self._disk.clip(offset, size)
                    data, filled = reply.slices.get(size) or reply.slice(size)
                    try:
                        sent = (
                            send_large(unique, offset, size, here=timed and here)
                            if size >= LARGE_READ_BYTES
                            else None
                        )
                        done = not size or read_nowait(data, offset) if sent is None else sent
                    except Exception as error:
                        fail(unique, error, "read", offset, size)
                        continue
                    if not done:
                        waiting.read(unique, offset, size)
                        if waiting.is_full():
                            return _FULL
                        continue
                    reads += 1
                    read_bytes += size
                    if sent:
                        message = None
                        in_pipes = True
                        if timed and sender and sender.is_sending(unique):
                            # Nobody says when the kernel has sent it: the next one then.
                            timed, owed = False, True
                    else:
                        pack(filled, 0, OUT_HEADER_SIZE + size, 0, unique)
                        message = filled
                elif opcode == WRITE:
                    data, _ = request.slices.get(size) or request.slice(size)
                    in_reach = writable and offset + size <= disk_size
                    given = False
                    try:
                        if (
                            size >= _LARGE_WRITE_BYTES
                            and in_reach
                            and not timed
                            and (not handed or large_writes.finish_if_done())
                        ):
                            handed = given = self._hand_over(unique, data, offset)
                        done = in_reach and not given and write_nowait(data, offset)
                    except Exception as error:
                        fail(unique, error, "write", offset, size)
                        continue
                    if not done:
                        if given or waiting.write(unique, data, offset, request):
                            self._request = request = self._requests.take()
                            view = request.view
                            vector = (view,)
                        if waiting.is_full():
                            return _FULL
                        budget -= size >> _BUDGET_SHIFT
                        continue
                    writes += 1
                    write_bytes += size
                    message = written_reply(unique, size)
                else:
                    self._dispatch(opcode, unique, view[:length])
                    if waiting.is_full():
                        return _FULL
                    continue
                if message is None:
                    if timed:
                        large.finish()
                elif streak <= _BUSY_STREAK or timed or size > _HELD_BYTES:
                    try:
                        write(fd, message)
                    except OSError as error:
                        answers.not_sent(error, message)
                else:
                    held.append(message)
                    if len(held) == 1:
                        send_at = perf_counter_ns() + _HELD_NANOSECONDS
                    elif len(held) == _MOST_HELD or perf_counter_ns() > send_at:
                        reply_each(held)
                    reply = buffers[len(held)]
                if timed:
                    add_latency(perf_counter_ns() - started, SAMPLE_EVERY)
                budget -= size >> _BUDGET_SHIFT
        finally:
            if handed:
                large_writes.finish()
            if in_pipes:
                large.settle() if writable else large.hand_over()
            reply_each(held)
            self._owes_sample = owed
            self._alone = alone
            statistics = self.statistics
            statistics.reads += reads
            statistics.read_bytes += read_bytes
            statistics.writes += writes
            statistics.write_bytes += write_bytes
        return _MORE

    def _send_large(self, unique: int, offset: int, size: int, *, here: bool) -> bool | None:
        """Answer a large READ from where its bytes are in memory. A plain function.

        Args:
            unique: The request's number.
            offset: Where it begins.
            size: Bytes.
            here: Not by the kernel itself.

        Returns:
            True: answered, or in a pipe. False: it must wait, for what it needs is to be inflated.
            None: its bytes are not to be had like this; read them.
        """
        access = self._disk.access
        header = protocol.OUT_HEADER.pack(OUT_HEADER_SIZE + size, 0, unique)
        lent = access.lend_nowait(offset, size)
        if lent is not None:
            if lent:
                self._answers.reply(header, lent)
            return bool(lent)
        ring = self._ring
        if ring:
            if ring.under_way and ring.reap():
                self._cached_replies = 0
            if self._cached_replies >= _CACHED_IN_TURN:
                move = partial(self._large.send_gathered, header, size)
                if ring.ahead.take(offset, size, move):
                    ring.ahead.note(offset, size)
                    return True
                if not here and ring.may_send():
                    ranges = access.file_ranges(offset, size)
                    request = unique, offset, size
                    if ranges and ring.send(header, ranges, request):
                        return True
        ranges = access.cached_ranges(offset, size)
        if ranges is None:
            self._cached_replies = 0
            return None
        self._cached_replies += 1
        if ring and ring.is_busy:
            ring.ahead.note(offset, size)
        return self._large.prepare(header, ranges) or None

    def _expected_ranges(self, offset: int, size: int) -> list[FileRange] | None:
        """Where the bytes of a READ are in files, which nobody has sent yet."""
        if offset + size > self._disk.size:
            return None
        return self._disk.access.likely_ranges(offset, size)

    def _ring_failed(self, request: tuple[int, int, int]) -> None:
        """Answer a large READ whose reply the kernel could not gather."""
        self._cached_replies = 0
        unique, offset, size = request
        self.statistics.reads -= 1
        self.statistics.read_bytes -= size
        self._waiting.read(unique, offset, size)

    async def _watch_ring(self, ring: ReplyRing) -> None:
        """Look after the ring while nothing else comes by."""
        with self._watching:
            while True:
                await trio.lowlevel.wait_readable(ring.fd)
                if ring.reap():
                    self._cached_replies = 0

    def _sleep(self) -> bool:
        """Wait a moment for a request, in the thread. A plain function.

        Returns:
            Whether there is one.
        """
        self._vain_spins += 1
        if self._vain_spins > _VAIN_SPINS:
            self._spin = 0
        begun = monotonic()
        found = bool(self._poll.poll(_SLEEP_MILLISECONDS))
        if found and monotonic() - begun < _SHORT_SLEEP:
            self._spin = _SPIN
            self._vain_spins = 0
        return found

    def _dispatch(self, opcode: int, unique: int, request: memoryview) -> None:
        """Start or pass on what is neither READ nor WRITE."""
        if opcode in _UNANSWERED or self._waiting.other(opcode, unique, request):
            return
        self.statistics.forwarded += 1
        self._forwarder.forward(opcode, unique, request)

    # --- large WRITEs -------------------------------------------------------------------------

    def _hand_over(self, unique: int, data: memoryview, offset: int) -> bool:
        """Have the second thread do a WRITE, whose data are in the receive buffer.

        Returns:
            Whether it does; the buffer is then taken.
        """
        if not self._poll.poll(0):  # nothing else is there to be done meanwhile
            return False
        write = self._disk.access.prepare_write_nowait(data, offset)
        if write is None:
            return False
        return self._large_writes.hand_over(LargeWrite(unique, data, offset, self._request), write)

    def _large_is_written(self, unique: int, size: int) -> None:
        self._answers.reply(protocol.written_reply(unique, size))

    def _large_is_finished(self, request: LargeWrite, outcome: bool | Exception) -> None:
        unique, data, offset, buffer = request
        if isinstance(outcome, Exception):
            self._answers.fail(unique, outcome, "write", offset, len(data))
        elif outcome:
            self.statistics.writes += 1
            self.statistics.write_bytes += len(data)
        elif self._waiting.write(unique, data, offset, buffer):
            return
        self._requests.give_back(buffer)

    # --- the kernel's pages -------------------------------------------------------------------

    async def _launder(self, guest_offset: int, length: int) -> None:
        """Make the kernel write back and drop its pages of a range.

        From a thread: it waits until those WRITEs are answered.
        """
        notification = protocol.invalidate_inode(self._inode, guest_offset, length)
        self._laundering += 1
        try:
            await trio.to_thread.run_sync(
                os.write, self._fd, notification, limiter=self._launderers
            )
        finally:
            self._laundering -= 1
            if not self._laundering and self._until_laundered is not None:
                self._until_laundered.cancel()

    # --- pyfuse3's half -------------------------------------------------------------------------

    async def pass_replies(self) -> None:
        """Write pyfuse3's replies to the kernel, until `shut`."""
        await self._forwarder.pass_replies()

    def shut(self) -> None:
        """Tell pyfuse3's loop that nothing more comes. Call `pyfuse3.terminate` first."""
        self._forwarder.shut()

    def give_back(self) -> None:
        """Put the real descriptor back where pyfuse3 reads, once its loop has ended."""
        self._disk.launder = None
        self._large.close()
        if self._ring:
            self._ring.close()
        self._second.close()
        os.dup2(self._fd, self._session_fd, inheritable=False)
        os.close(self._fd)
        self._forwarder.close()
