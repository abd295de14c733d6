"""Giving up what the daemon does not need once the disk is mounted.

From then on every file that it works with is open. What it gives up, in all its threads and for
good, as far as the kernel can do that:

- opening files (landlock(7)): nothing but reading below the folders that Python's modules come
  from, and, for `metrics=FILE`, writing in that file's folder; running programs; connecting to
  abstract sockets and by TCP; signals to others;
- system calls (seccomp(2)): what landlock does not know of, such as chmod, sockets that are not
  local, mounts, namespaces, kernel modules, ptrace. Needs the library libseccomp;
- capabilities(7): all but what keeps writes going where only root may fill the disk;
- and no program that it might run could bring rights back (no_new_privs).

Both landlock and capabilities belong to threads. Those that there are take the step each by itself,
and new ones inherit it; so this has to be done before threads exist that are not trio's.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import site
import struct
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from .privileges import keep_capabilities

__all__ = ["Confinement", "landlock_version"]

log = logging.getLogger("imagofs")

_libc = ctypes.CDLL(None, use_errno=True)

# Numbers of system calls, the same on every architecture that Python 3.11 runs on.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

# Rights of landlock(7).
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE = 1 << 1, 1 << 2, 1 << 3, 1 << 5
_MAKE_REG, _TRUNCATE = 1 << 8, 1 << 14
#: For a version of the interface, how many rights about files it knows: bits 0 and up.
_FILE_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_NET_VERSION, _SCOPE_VERSION = 4, 6
_TCP = 1 << 0 | 1 << 1  # to bind and to connect
_SCOPE_OF_SOCKETS, _SCOPE_OF_SIGNALS = 1 << 0, 1 << 1

_PR_SET_NO_NEW_PRIVS = 38
#: CAP_SYS_RESOURCE: quotas and reserved blocks do not bind who has it, and writes would be lost.
#: CAP_DAC_READ_SEARCH: to read Python's modules, wherever they are; landlock leaves nothing else.
_KEPT_CAPABILITIES: Final = (24, 2)

_THREAD_SECONDS = 5.0
_ROUNDS = 5


class _Refused(Exception):
    """The kernel cannot do it, or will not."""


def landlock_version() -> int:
    """The version of the kernel's landlock; 0 if it has none, or has it switched off."""
    version: int = _libc.syscall(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    return max(version, 0)


class Confinement:
    """What is to be given up. Made while files can still be looked at; then `enter`, once.

    Args:
        folder: Where files may be made and written even then; None: nowhere.
    """

    def __init__(self, *, folder: str | None = None) -> None:
        #: What cannot be given up here; empty if nothing.
        self.missing = ""
        self._rules: int | None = None
        try:
            self._rules = _ruleset(folder)
        except _Refused as error:
            self.missing = str(error)

    async def enter(self) -> str:
        """Give it up, for good. Nothing else may run in the process meanwhile.

        Returns:
            What could not be given up; empty if nothing.
        """
        time.tzset()  # the log's times are looked up in a file
        sys.dont_write_bytecode = True  # a try would be refused, and perhaps logged by the kernel
        try:
            await _in_all_threads(partial(_confine_thread, self._rules))
        except _Refused as error:
            self.missing = "; ".join(filter(None, (self.missing, str(error))))
        self.close()
        try:
            _filter_system_calls()
        except _Refused as error:
            log.debug("system calls are not filtered: %s", error)
        return self.missing

    def close(self) -> None:
        """Forget about it, unless it was entered."""
        if self._rules is not None:
            os.close(self._rules)
            self._rules = None


# --- threads --------------------------------------------------------------------------------------


async def _in_all_threads(work: Callable[[], None]) -> None:
    """Do `work` in every thread of this process, the calling one last.

    Raises:
        _Refused: There is a thread that cannot be reached, or `work` failed in one.
    """
    done = {threading.get_native_id()}
    for _ in range(_ROUNDS):
        threads = {int(name) for name in os.listdir("/proc/self/task")}
        if threads <= done:
            work()
            return
        # Trio keeps its idle threads and hands each of as many jobs to another one of them.
        number = len(threads) - 1
        gate = threading.Barrier(number)

        def step(gate: threading.Barrier = gate) -> None:
            gate.wait(_THREAD_SECONDS)
            me = threading.get_native_id()
            if me not in done:
                work()
                done.add(me)

        limiter = trio.CapacityLimiter(number)
        async with trio.open_nursery() as nursery:
            failures: list[Exception] = []

            async def one(
                step: Callable[[], None] = step,
                limiter: trio.CapacityLimiter = limiter,
                failures: list[Exception] = failures,
            ) -> None:
                try:
                    await trio.to_thread.run_sync(step, limiter=limiter)
                except (_Refused, threading.BrokenBarrierError) as error:
                    failures.append(error)

            for _ in range(number):
                nursery.start_soon(one)
        if failures:
            raise _Refused(f"in all threads: {failures[0]!r}")
    raise _Refused("in all threads: one cannot be reached")


def _confine_thread(rules: int | None) -> None:
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise _refused("no_new_privs")
    if rules is not None and _libc.syscall(_RESTRICT_SELF, rules, 0):
        raise _refused("landlock_restrict_self")
    try:
        keep_capabilities(*_KEPT_CAPABILITIES)
    except OSError as error:
        raise _Refused(str(error)) from None


def _refused(what: str) -> _Refused:
    return _Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


# --- landlock -------------------------------------------------------------------------------------


def _ruleset(folder: str | None) -> int:
    """Make the set of rules; a descriptor.

    Raises:
        _Refused: The kernel has no landlock.
    """
    version = landlock_version()
    if not version:
        raise _Refused("the kernel has no landlock, or has it switched off")
    known = (1 << _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]) - 1
    net = _TCP if version >= _NET_VERSION else 0
    scope = _SCOPE_OF_SOCKETS | _SCOPE_OF_SIGNALS if version >= _SCOPE_VERSION else 0
    # A kernel takes as much of the structure as it knows.
    words = 3 if version >= _SCOPE_VERSION else 2 if version >= _NET_VERSION else 1
    attributes = struct.pack("=3Q", known, net, scope)[: words * 8]
    rules = _libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        raise _refused("landlock_create_ruleset")
    os.set_inheritable(rules, False)
    for path in _code_folders():
        _allow(rules, path, _READ_FILE | _READ_DIR)
    if folder is not None:
        _allow(rules, folder, known & (_WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE))
    return int(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # it is not there
        return
    try:
        rule = struct.pack("=Qi", rights, folder)
        if _libc.syscall(_ADD_RULE, rules, _RULE_PATH_BENEATH, rule, 0):
            raise _refused(f"landlock_add_rule for {path}")
    finally:
        os.close(folder)


def _code_folders() -> list[str]:
    """Where modules, and the libraries that they need, may be loaded from later."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {*site.getsitepackages(), site.getusersitepackages()}
    paths |= {"/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64"}
    paths |= {os.path.join(prefix, "lib") for prefix in (sys.prefix, sys.base_prefix)}
    # What was imported from elsewhere may have modules that were not imported yet.
    for module in list(sys.modules.values()):
        paths |= {os.path.abspath(folder) for folder in getattr(module, "__path__", ())}
    return sorted(path for path in paths if path not in ("", "/"))


# --- seccomp --------------------------------------------------------------------------------------

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_ALL_THREADS = 4  # SCMP_FLTATR_CTL_TSYNC
_NOT_EQUAL = 1  # SCMP_CMP_NE
_AF_UNIX = 1
_DENIED: Final = (
    # programs, other processes
    "execve execveat ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp process_madvise "
    # mounts, namespaces
    "mount umount umount2 mount_setattr move_mount open_tree fsopen fsconfig fsmount fspick "
    "pivot_root chroot unshare setns swapon swapoff quotactl quotactl_fd acct "
    # what landlock does not know of: attributes, files that are named by a handle
    "chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat futimesat "
    "setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat "
    "open_by_handle_at mknod mknodat "
    # ways around a filter, and large pieces of the kernel; a ring that there is can only splice
    # (fuse/splice_ring.py)
    "io_uring_setup io_uring_register bpf perf_event_open userfaultfd keyctl "
    "add_key request_key personality modify_ldt "
    # the machine
    "init_module finit_module delete_module kexec_load kexec_file_load reboot settimeofday "
    "clock_settime clock_adjtime adjtimex sethostname setdomainname iopl ioperm syslog"
)


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("value2", ctypes.c_uint64),
    )


def _filter_system_calls() -> None:
    """Refuse what nothing here ever calls, in all threads.

    Raises:
        _Refused: There is no libseccomp, or the kernel has no such filters.
    """
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise _Refused("libseccomp is not installed") from None
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    if context.value is None:
        raise _Refused("seccomp_init")
    try:
        library.seccomp_attr_set(context, _ALL_THREADS, ctypes.c_uint32(1))
        deny = ctypes.c_uint32(_ERRNO | errno.EPERM)
        for name in _DENIED.split():
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number >= 0:  # this architecture has it
                library.seccomp_rule_add_array(context, deny, number, 0, None)
        number = library.seccomp_syscall_resolve_name(b"socket")
        foreign = _Comparison(0, _NOT_EQUAL, _AF_UNIX, 0)
        library.seccomp_rule_add_array(context, deny, number, 1, ctypes.byref(foreign))
        code = library.seccomp_load(context)
    finally:
        library.seccomp_release(context)
    if code:
        raise _Refused(f"seccomp_load: {os.strerror(-code)}")
