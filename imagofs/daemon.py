"""From the command to a mount that answers, and from its end to an image that is on the disk.

The order is fixed: the process forks (before any thread exists), the child opens the image, mounts,
gives up the rights that it needs no more (a helper keeps the few that its end needs), and serves;
the parent waits for one line: that the mount answers, or what is wrong. After the end
the image is flushed, synced and closed, and only then does the process end; whoever waits for it
(`imagofs umount`) is told what was lost, if anything was.

The daemon never touches its own mountpoint: nobody would answer.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final

from .arguments import path_of
from .cli.options import MountOptions
from .errors import ImagofsError, OutOfRangeError, StorageError, UnsupportedError
from .fuse import mounts, utab
from .fuse.mountpoint import prepare_mountpoint, take_turn
from .fuse.wakefulness import Wakefulness, open_wakefulness
from .logs import log_to_stderr, log_to_syslog
from .notify import Notifier
from .privileges import Helper, become
from .reporting import ask_for_time, microseconds, report

if TYPE_CHECKING:
    import trio

    from .access import FormatAccess
    from .confining import Confinement
    from .fuse.control import ControlSocket
    from .fuse.disk import ImageStatus
    from .fuse.operations import Shown
    from .fuse.session import Session

__all__ = ["mount"]

log = logging.getLogger("imagofs")

_READY: Final = b"\0"
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_IO_FLUSHER = 57
_M_ARENA_MAX = -8
_OOM_SCORE = -900


def mount(
    image: str,
    mountpoint: str,
    options: MountOptions,
    *,
    foreground: bool = False,
    verbosity: int = 0,
) -> int:
    """Mount an image.

    Args:
        image: Its path.
        mountpoint: A directory, or a regular file that becomes the disk itself.
        options: What `-o` asked for.
        foreground: Serve in this process, and log to stderr, instead of in the background.
        verbosity: 0: log failures and what changes; 1: more; 2: everything.

    Returns:
        The exit code. In the background: 0 once the mount answers.

    Raises:
        ImagofsError: It failed before the mount answered (in the foreground).
    """
    if folder := os.environ.get("TMPDIR"):
        os.environ["TMPDIR"] = os.path.abspath(folder)  # the daemon's current directory is another
    notifier = Notifier.from_environment() if foreground else Notifier()
    daemon = _Daemon(os.path.abspath(path_of(image)), mountpoint, options, notifier)
    if foreground:
        log_to_stderr(verbosity)
        try:
            return daemon.run(lambda: None)
        except _ToldToEnd as error:
            log.info("%s", error)
            return 0
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return _wait_until_ready(reader, child)
    os.close(reader)
    code = 1
    try:
        code = _run_in_background(daemon, writer, verbosity)
    finally:
        os._exit(code)


def _wait_until_ready(reader: int, child: int) -> int:
    """In the parent: wait for the line from the child."""
    try:
        with open(reader, "rb") as pipe:
            line = pipe.read()
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    if line == _READY:
        return 0
    _, status = os.waitpid(child, 0)
    if not line:
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        line = f"the daemon {how} before the mount answered".encode()
    from .cli import report

    report(os.fsdecode(line))
    return 1


def _run_in_background(daemon: _Daemon, writer: int, verbosity: int) -> int:
    """In the child: become a daemon, and report to the parent through `writer`."""
    # An automount lets only the process group of mount(8) pass until something is mounted: the own
    # one comes later. Until then a Ctrl-C is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir("/")
    log_to_stderr(verbosity)  # until the mount answers, the terminal is still there
    inherited = _open_descriptors() - {0, 1, 2, writer}
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)
    open_pipe = True

    def ready() -> None:
        nonlocal open_pipe
        os.setsid()
        log_to_syslog(verbosity)
        os.dup2(null, 2)
        # A script's locks and pipes end with the script. (The image may be named by /dev/fd/N.)
        for descriptor in inherited:
            os.close(descriptor)
        open_pipe = False
        try:
            os.write(writer, _READY)
        except BrokenPipeError:
            # Whoever gave the command has gone, and will not know of the mount.
            os.kill(os.getpid(), signal.SIGTERM)
        os.close(writer)

    try:
        return daemon.run(ready)
    except ImagofsError as error:
        line = str(error)
    except Exception as error:
        if not open_pipe:
            log.critical("%s: the daemon ends: %r", daemon.point, error, exc_info=error)
            return 1
        line = _reason(error, daemon.image)
    if open_pipe:
        os.write(writer, os.fsencode(line))
    else:
        log.error("%s", line)
    return 1


def _reason(error: Exception, image: str) -> str:
    """What went wrong, for people, whatever nurseries it came through."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return str(error) if isinstance(error, ImagofsError) else f"{image}: {error!r}"


def _open_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:  # the one that the listing itself used
            continue
        found.add(int(name))
    return found


class _ToldToEnd(StorageError):
    """A signal came while the image was being opened: nothing is mounted."""


class _Daemon:
    """What serves one mount.

    Args:
        image: The image's absolute path.
        mountpoint: As it was given.
        options: What `-o` asked for.
        notifier: Who hears of its state.
    """

    def __init__(
        self, image: str, mountpoint: str, options: MountOptions, notifier: Notifier
    ) -> None:
        self.image = image
        self.options = options
        self.notifier = notifier
        self.point = mounts.real_path(mountpoint)
        self._is_file = False
        self._turn: int | None = None
        self._wakefulness: Wakefulness | None = None
        #: The file of metrics.
        self._metrics_file: str | None = None

    def run(self, ready: Callable[[], None]) -> int:
        """Open, mount, serve, flush.

        Args:
            ready: Called once the mount answers.

        Returns:
            The exit code: 0, or 1 if something was lost.

        Raises:
            ImagofsError: Something failed before the mount answered; nothing is mounted.
        """
        self._is_file = prepare_mountpoint(self.point, make=self.options.mkdir)
        self._turn = take_turn(self.point)
        prepare_mountpoint(self.point)  # another may have had its turn before
        if self._is_file and self.options.name is not None:
            raise OutOfRangeError(
                "the mountpoint is a file, and name= is for directories", filename=self.point
            )
        if self.options.setuid is not None and os.geteuid():
            raise StorageError("option 'setuid' is for root", error=errno.EPERM)
        _prepare_process(writable=self.options.writable)
        metrics = self.options.metrics
        if metrics is not None:
            path = os.path.realpath(metrics.path)
            if os.path.commonpath((path, self.point)) == self.point:
                raise OutOfRangeError("metrics= is inside the mountpoint", filename=path)
            self._metrics_file = None if metrics.is_socket else metrics.path
        self._wakefulness = open_wakefulness(self.options.channel and self.options.awake)
        helper = Helper(remove=metrics and metrics.path)  # before there are threads
        try:
            import trio

            return trio.run(self._run, helper, ready)
        finally:
            helper.close()
            if self._wakefulness:
                self._wakefulness.close()

    async def _run(self, helper: Helper, ready: Callable[[], None]) -> int:
        import trio

        from . import metrics_socket

        confinement = self._prepare_confinement()
        # What is not read by the end is delivered then, and these would make a failure of it.
        for number in (signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        # From here on until the end is written nothing but SIGKILL ends the process early.
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            access = await self._open_unless_told_to_end(signals)
            try:
                session = self._mount(access, helper)
                if self._turn is not None:
                    os.close(self._turn)
            except BaseException:
                await access.close()
                raise
            control = self._listen(session)
            listener = self._listen_for_metrics()
            try:
                if session.device is not None:
                    made = self._metrics_file is not None or listener is not None
                    helper.watch(session.device, remove=made)
                await self._give_up_rights(confinement)
            except BaseException:
                for point in session.places():
                    helper.detach(point)
                session.abandon()
                await access.close()
                raise
            gc.collect()
            gc.freeze()  # what is there now stays: no collection needs to look at it again
            lost = "the daemon failed"
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._obey, signals, session, helper, nursery)
                    if control is not None:
                        nursery.start_soon(control.serve)
                    nursery.start_soon(report, self.notifier, session, self._metrics_file)
                    if listener is not None:
                        nursery.start_soon(metrics_socket.serve, listener, session.metrics)

                    def announce() -> None:
                        nursery.start_soon(self._announce, helper, access.format_name, ready)

                    def give_up_name() -> None:
                        if control is not None:
                            control.stop_listening()

                    await session.serve(announce, give_up_name)
                    nursery.cancel_scope.cancel()
            finally:
                try:
                    lost = await self._finish(access)
                finally:
                    if control is not None:
                        control.end(lost)
        return 1 if lost else 0

    async def _open_unless_told_to_end(self, signals: AsyncIterator[int]) -> FormatAccess:
        """Open the image; a signal ends that, and nothing of it is left."""
        import trio

        access: FormatAccess | None = None
        error: ImagofsError | None = None

        async def wait_for_signal() -> None:
            async for number in signals:
                if number in (signal.SIGTERM, signal.SIGINT):
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_signal)
            try:
                access = await self._open()
            except ImagofsError as failure:  # not as a group
                error = failure
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error
        if access is None:
            raise _ToldToEnd("told to end before it was mounted", error=errno.EINTR)
        return access

    async def _open(self) -> FormatAccess:
        from . import gate as gates
        from .opening import open_image

        options = self.options
        gate: gates.ImplicitOpenGate = gates.PermissiveImplicitOpenGate()
        if options.deny:
            gate = gates.DenyImplicitOpenGate()
        elif options.allow:
            gate = gates.AllowDirectories(options.allow)
        if options.overlay is not None:
            from .overlaying import open_with_overlay

            return await open_with_overlay(
                self.image,
                options.overlay or None,
                gate=gate,
                format=options.format,
                lock=options.lock,
                metadata_bytes=options.metadata_bytes,
                inflated_bytes=options.inflated_bytes,
            )
        return await open_image(
            self.image,
            writable=options.writable,
            format=options.format,
            gate=gate,
            lock=options.lock,
            snapshot=options.snapshot,
            metadata_bytes=options.metadata_bytes,
            inflated_bytes=options.inflated_bytes,
        )

    def _prepare_confinement(self) -> Confinement | None:
        if not self.options.confine:
            return None
        from .confining import Confinement

        confinement = Confinement(folder=self._metrics_file and os.path.dirname(self._metrics_file))
        self._check_confinement(confinement.missing)
        return confinement

    def _check_confinement(self, missing: str) -> None:
        if not missing:
            return
        if self.options.confine is True:
            raise UnsupportedError(
                f"cannot confine the daemon: {missing}; confine=auto does what can be done",
                filename=self.image,
            )
        log.debug("%s: not confined: %s", self.image, missing)

    async def _give_up_rights(self, confinement: Confinement | None) -> None:
        mounts.keep_table_open()
        if self.options.setuid is not None:
            _import_what_may_be_needed()
            become(self.options.setuid)
        if confinement is not None:
            self._check_confinement(await confinement.enter())

    def _mount(self, access: FormatAccess, helper: Helper) -> Session:
        from .fuse.disk import Disk
        from .fuse.session import Session, SessionOptions

        options = self.options
        disk = Disk(access, writable=options.writable, writeback=options.writeback)
        session = Session(
            disk,
            SessionOptions(
                point=self.point,
                source=options.fsname or self.image,
                shown=self._shown(disk.image_status()),
                allow_other=options.allow_other,
                channel=options.channel,
                wakefulness=self._wakefulness,
                kernel=options.kernel,
                detach=helper.detach,
                is_severed=helper.is_severed,
            ),
        )
        session.mount()
        return session

    def _shown(self, image: ImageStatus) -> Shown:
        """How the file appears: as the image, but never without use for who mounted it."""
        from .fuse.operations import Shown

        options = self.options
        user = os.geteuid()
        own = 0o600 if options.writable else 0o400
        mode = image.mode & 0o666 | own if options.mode is None else options.mode
        name = options.name or default_name(self.image)
        return Shown(
            name=None if self._is_file else os.fsencode(name),
            uid=(user or image.uid) if options.uid is None else options.uid,
            gid=image.gid if options.gid is None else options.gid,
            mode=mode if options.writable else mode & 0o555,
            direct_io=options.direct_io,
        )

    def _listen(self, session: Session) -> ControlSocket | None:
        from .fuse.control import ControlSocket

        if session.device is None:
            return None
        try:
            return ControlSocket(session.device)
        except OSError as error:
            log.warning("%s: 'imagofs umount' will not find the daemon: %s", self.point, error)
            return None

    def _listen_for_metrics(self) -> socket.socket | None:
        from . import metrics_socket

        metrics = self.options.metrics
        if metrics is None or not metrics.is_socket:
            return None
        try:
            return metrics_socket.listen(metrics.path)
        except OSError as error:
            reason = error.strerror or error
            log.warning("%s: cannot listen for who asks for metrics: %s", metrics.path, reason)
            return None

    async def _announce(self, helper: Helper, kind: str, ready: Callable[[], None]) -> None:
        """Say that the mount answers, to umount(8) first."""
        import trio

        if utab.is_wanted():
            # Even if it has just ended: somebody waits for `ready`.
            with trio.CancelScope(shield=True):
                try:
                    await trio.to_thread.run_sync(helper.enter, self.point)
                except OSError as error:
                    log.debug("%s: umount(8) is not told: %s", self.point, error)
        ready()
        what = f"{kind}, {'rw' if self.options.writable else 'ro'}"
        log.info("%s: mounted %s (%s)", self.point, self.image, what)
        self.notifier.tell(READY="1", STATUS=f"mounted {self.image} ({what})")

    async def _obey(
        self,
        signals: AsyncIterator[int],
        session: Session,
        helper: Helper,
        nursery: trio.Nursery,
    ) -> None:
        asked = False
        async for number in signals:
            if number == signal.SIGHUP:
                log.info("%s: SIGHUP: there is nothing to reload", self.point)
            elif number == signal.SIGUSR1:
                log.info("%s: %s", self.point, session.statistics())
            elif number in (signal.SIGTERM, signal.SIGINT):
                if asked:
                    log.warning("%s: asked twice to end: not waiting for its users", self.point)
                    session.stop()
                else:
                    asked = True
                    nursery.start_soon(self._end, session, helper)

    async def _end(self, session: Session, helper: Helper) -> None:
        """Take the mount away; the session ends with its last user."""
        import trio

        timeout = self.options.stop_timeout
        patience = "" if timeout is None else f", or after {timeout:.0f} s"
        self.notifier.tell(
            STOPPING="1",
            STATUS="waiting for the last user",
            # Beyond that time there is the flush, which asks for more by itself.
            **({} if timeout is None else {"EXTEND_TIMEOUT_USEC": microseconds(timeout + 30)}),
        )
        users = await trio.to_thread.run_sync(helper.users, self.point)
        if users:
            log.warning(
                "%s: still used by %s: ends with the last of them%s", self.point, users, patience
            )
        if await session.detach():
            if timeout is None:
                return
            await trio.sleep(timeout)
            log.warning("%s: still used after %.0f s: not waiting any more", self.point, timeout)
        session.stop()

    async def _finish(self, access: FormatAccess) -> str:
        """Bring everything to the disk.

        Returns:
            What was lost; empty if nothing.
        """
        import trio

        self.notifier.tell(STOPPING="1", STATUS="writing what is left to the disk")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask_for_time, self.notifier)
                await access.close()
                nursery.cancel_scope.cancel()
        except Exception as error:
            reason = _reason(error, self.image)
            lost = f"{reason}; what was written since the last successful sync may be lost"
            log.critical("%s", lost)
            return lost
        log.info("%s: unmounted, everything is on the disk", self.point)
        return ""


def default_name(image: str) -> str:
    """The disk's name in a directory mount: the image's, with `.raw` for its extension."""
    return os.path.splitext(os.path.basename(image))[0] + ".raw"


def _import_what_may_be_needed() -> None:
    """Another user may not get into the folders that modules come from."""
    from .inflating import deflate_library, zstd_library
    from .storage import bounce  # noqa: F401

    deflate_library()
    try:
        zstd_library()
    except UnsupportedError:  # the image that needs it says so
        pass


def _prepare_process(*, writable: bool) -> None:
    """Keep going when memory runs short: others wait for this process to write theirs back.

    And take less of it: one heap for all threads. With one for each, what the inflating threads
    took stays theirs when it comes free, and the daemon grows to twice what its caches hold.
    """
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and "MALLOC_ARENA_MAX" not in os.environ:
        libc.mallopt(_M_ARENA_MAX, 1)
    if writable:
        # Fails without CAP_SYS_RESOURCE; threads that start later inherit it.
        libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    try:
        with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
            file.write(b"%d" % _OOM_SCORE)
    except OSError as error:
        log.debug("the OOM score stays as it is: %s", error)
