"""The life of a mount: mount it, serve it, take it away.

pyfuse3 mounts and answers names and attributes; the data channel stands in front of its session
(`channel.py`), unless it is switched off. A mount ends in one of these ways:

- it is unmounted: the kernel says ENODEV once the last user is gone;
- `detach` was called (SIGTERM): as above, it only vanishes from its place at once;
- the connection is severed (`umount -f`, an abort): ENODEV too, and the mount is still in place; it
  is detached here;
- `stop` was called: nobody waits for the last user.

In each of them every request that was read is answered, and `serve` returns.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyfuse3
import trio

from ..errors import ImagofsError, StorageError
from . import mounts, protocol
from .channel import Channel
from .disk import Disk
from .operations import Operations, Shown
from .statistics import metrics, one_line, snapshot
from .wakefulness import Wakefulness

__all__ = ["Session", "SessionOptions"]

log = logging.getLogger(__name__)

_FUSE_DEVICE = os.makedev(10, 229)
_MAX_BACKGROUND = 256
_READ_AHEAD_KIB = 1024


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a disk is mounted.

    Attributes:
        point: The mountpoint, a real path.
        source: What mount(8) shows as the source.
        shown: How the file appears.
        detach: Takes what is mounted at a point away, even while it is used; called in a thread.
        is_severed: Whether what is mounted at a point has lost its daemon; called in a thread.
        allow_other: Let other users in.
        channel: Use the data channel.
        wakefulness: For the channel: what keeps processors awake; None: nothing. The caller's to
            close.
        kernel: Further mount options for the kernel ("nosuid", "noatime" ...).
    """

    point: str
    source: str
    shown: Shown
    detach: Callable[[str], None]
    is_severed: Callable[[str], bool]
    allow_other: bool = False
    channel: bool = True
    wakefulness: Wakefulness | None = None
    kernel: tuple[str, ...] = ()


class _Option(str):
    """A mount option with any letters: pyfuse3 encodes options as ASCII, and asks `str` to."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))


def escape_option(value: str) -> str:
    """A value as libfuse's option parser reads it back: it splits at commas."""
    return value.replace("\\", "\\\\").replace(",", "\\,")


class Session:
    """One mount. `mount`, then `serve`; `detach` and `stop` end it.

    Args:
        disk: What is shown.
        options: How it is mounted.
    """

    def __init__(self, disk: Disk, options: SessionOptions) -> None:
        self.disk = disk
        self.options = options
        #: "major:minor" of the mounted file system, None before.
        self.device: str | None = None
        self.channel: Channel | None = None
        #: For the statistics: when it began, and what the image took on the host then.
        self.started = time.monotonic()
        self.allocated_at_start = disk.access.allocated_bytes()
        self._ready: Callable[[], None] | None = None
        self._operations = Operations(disk, options.shown, self._initialised, self.snapshot)
        self._threads = trio.CapacityLimiter(2)
        self._stopping = False
        self._loop_scope = trio.CancelScope()
        self._read_ahead: int | None = None
        self._source = ""  # as the table of mounts has it
        #: /dev/fuse, to ask whether the kernel has ended the connection.
        self._connection: int | None = None

    # --- mounting -----------------------------------------------------------------------------

    def mount(self) -> None:
        """Mount. A plain function, which may wait for fusermount3.

        Raises:
            ImagofsError: It failed; nothing is mounted.
        """
        before = _fuse_descriptors()
        options = {
            "default_permissions",
            f"subtype={mounts.FSTYPE.partition('.')[2]}",
            _Option(f"fsname={escape_option(self.options.source)}"),
            "rw" if self.disk.writable else "ro",
            *self.options.kernel,
        }
        if self.options.allow_other:
            options.add("allow_other")
        with _CapturedStderr() as captured:
            try:
                pyfuse3.init(self._operations, self.options.point, options)
            except RuntimeError as error:
                failure: RuntimeError | None = error
            else:
                failure = None
        if failure is not None:
            raise self._mount_error(captured.text) from failure
        for line in captured.text.splitlines():
            log.warning("%s", line)
        mount = mounts.find_at(self.options.point)
        if mount is not None and mount.fstype == mounts.FSTYPE:
            self.device = mount.device
            self._source = mount.source
            self._open_read_ahead(mount.device)
        (session_fd,) = _fuse_descriptors() - before
        self._connection = os.dup(session_fd)
        if self.options.channel:
            self.channel = self._open_channel(session_fd)

    def _mount_error(self, text: str) -> ImagofsError:
        reasons = [
            line.removeprefix("fuse: ").removeprefix("fusermount3: ").strip()
            for line in text.splitlines()
            if line.strip()
        ]
        reason = "; ".join(dict.fromkeys(reasons)) or "libfuse does not say why"
        if not os.path.exists("/dev/fuse"):
            reason += " (load the fuse module, or pass /dev/fuse into the container)"
        return StorageError(
            f"cannot mount: {reason}", error=errno.EPERM, filename=self.options.point
        )

    def _open_channel(self, session_fd: int) -> Channel:
        direct_io = self.options.shown.direct_io
        wanted = protocol.HANDLE_KILLPRIV_V2
        if direct_io:
            wanted |= protocol.DIRECT_IO_ALLOW_MMAP
        open_flags = protocol.FOPEN_PARALLEL_DIRECT_WRITES if direct_io else 0
        if not self.disk.writable:
            open_flags |= protocol.FOPEN_NOFLUSH
        return Channel(
            session_fd,
            self.disk,
            inode=self._operations.file_inode,
            amendments=protocol.Amendments(
                wanted=wanted,
                unwanted=protocol.AUTO_INVAL_DATA | protocol.ATOMIC_O_TRUNC,
                max_background=_MAX_BACKGROUND,
            ),
            direct_io=direct_io,
            open_flags=open_flags,
            wakefulness=self.options.wakefulness,
            negotiated=self._negotiated,
        )

    def snapshot(self) -> dict[str, Any]:
        """What was done so far."""
        return snapshot(self)

    def statistics(self) -> str:
        """The same in one line."""
        return one_line(snapshot(self))

    def metrics(self) -> str:
        """The same in Prometheus' text format."""
        return metrics(snapshot(self))

    # --- serving ------------------------------------------------------------------------------

    async def serve(
        self, ready: Callable[[], None], ended: Callable[[], None] = lambda: None
    ) -> None:
        """Answer requests until the mount has ended.

        Args:
            ready: Called once the mount answers.
            ended: Called once nothing more comes, before anything is asked of any mount: a mount
                that got this one's number may be waiting for what `ended` gives up.
        """
        self._ready = ready
        self._token = trio.lowlevel.current_trio_token()
        try:
            async with trio.open_nursery() as nursery:
                if self.channel is None:
                    with self._loop_scope:
                        await pyfuse3.main()
                else:
                    nursery.start_soon(pyfuse3.main)
                    nursery.start_soon(self.channel.pass_replies)
                    await self.channel.serve()
                ended()
                await self._leave()
                if self.channel is not None:
                    pyfuse3.terminate()
                    self.channel.shut()
        finally:
            self._close()

    def _initialised(self) -> None:
        # Without the channel this is all that is heard of INIT. Its reply leaves before anything
        # else runs.
        if self.channel is None:
            self._token.run_sync_soon(self._announce)

    def _negotiated(self, features: int) -> None:
        log.debug("negotiated features: %#x", features)
        self._announce()

    def _announce(self) -> None:
        self._raise_read_ahead()
        if self._ready is not None:
            self._ready()

    def _open_read_ahead(self, device: str) -> None:
        # It is written when INIT is answered, which may set it; this process may then have no
        # right to open it any more.
        try:
            self._read_ahead = os.open(
                f"/sys/class/bdi/{device}/read_ahead_kb", os.O_RDWR | os.O_CLOEXEC
            )
        except OSError as error:
            log.debug("read-ahead stays as it is: %s", error)

    def _raise_read_ahead(self) -> None:
        """Let the kernel read further ahead than its default, where that is allowed."""
        if self._read_ahead is None:
            return
        try:
            if int(os.pread(self._read_ahead, 32, 0)) < _READ_AHEAD_KIB:
                os.pwrite(self._read_ahead, b"%d" % _READ_AHEAD_KIB, 0)
        except (OSError, ValueError) as error:
            log.debug("read-ahead stays as it is: %s", error)
        os.close(self._read_ahead)
        self._read_ahead = None

    async def _leave(self) -> None:
        """See to it that nothing is mounted any more."""
        points = await self._own_places()
        if points and not self._stopping:
            log.warning("the connection was severed while %s was mounted", points[0])
        await self._detach(points)

    async def _own_places(self) -> list[str]:
        """As `places`, without what is another daemon's."""
        points = self.places()
        if not self._has_ended():
            return points
        # The kernel gives the device's number to the next mount as soon as this one is gone: what
        # has that number and answers is another daemon's.
        return [point for point in points if await self._is_severed(point)]

    def _has_ended(self) -> bool:
        """Whether the kernel has ended the connection: the mount is gone, or severed."""
        if self._connection is None:
            return True
        poll = select.poll()
        poll.register(self._connection, 0)
        return bool(poll.poll(0))

    async def _is_severed(self, point: str) -> bool:
        """Whether the mount at `point` has lost its daemon; only asked once this one has ended."""
        try:
            return await trio.to_thread.run_sync(self.options.is_severed, point)
        except OSError:  # another mount is there
            return False

    def places(self) -> list[str]:
        """Where it is mounted now; empty once it is unmounted or detached."""
        if self.device is None:
            return []
        # Its number may be another mount's by now, of another image mostly.
        found = mounts.find_device(self.device)
        return [mount.point for mount in found if mount.source == self._source]

    async def detach(self) -> bool:
        """Take the mount from its place; who uses it can go on. `serve` returns after the last.

        Returns:
            False if that failed somewhere, which is logged.
        """
        return await self._detach(await self._own_places())

    async def _detach(self, points: list[str]) -> bool:
        done = True
        for point in points:
            try:
                # It waits for WRITEs that the kernel sends on this occasion.
                await trio.to_thread.run_sync(self.options.detach, point, limiter=self._threads)
            except OSError as error:
                log.error("%s: cannot unmount: %s", point, error.strerror or error)
                done = False
        return done

    def stop(self) -> None:
        """End `serve` although the mount is in use: its users get errors."""
        self._stopping = True
        if self.channel is not None:
            self.channel.stop()
        else:
            self._loop_scope.cancel()

    def abandon(self) -> None:
        """Unmount what was mounted and never served."""
        self._close()

    def _close(self) -> None:
        if self.channel is not None:
            self.channel.give_back()
        if self._connection is not None:
            os.close(self._connection)
            self._connection = None
        if self._read_ahead is not None:
            os.close(self._read_ahead)
            self._read_ahead = None
        # libfuse would unmount by name whatever is at that place now.
        pyfuse3.close(unmount=bool(self.places()) or self.device is None)


class _CapturedStderr:
    """Catches what libfuse and fusermount3 write to stderr, which they do beside Python."""

    def __enter__(self) -> _CapturedStderr:
        self.text = ""
        self._file = os.memfd_create("stderr")
        self._saved = os.dup(2)
        os.dup2(self._file, 2)
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)
        self.text = os.fsdecode(os.pread(self._file, 1 << 16, 0))
        os.close(self._file)


def _fuse_descriptors() -> set[int]:
    """This process's descriptors that are /dev/fuse."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:  # the one that the listing itself used
            continue
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == _FUSE_DEVICE:
            found.add(int(name))
    return found
