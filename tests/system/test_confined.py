"""What a daemon may still do once it serves: attempts to get out are made inside it, and fail."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagofs.confining import landlock_version
from tests import qemu
from tests.conftest import NewImage
from tests.mount.mounting import MountImage, imagofs, mount_at, mounting

#: Replaces the figures of `imagofs stat` by what came of the attempts.
_ATTEMPTS = """
import ctypes, errno, json, os, signal, socket, subprocess, sys, threading
import imagofs.fuse.session
from imagofs.cli import main

point, folder, tcp, abstract, process, only = sys.argv[2], *sys.argv[4:]
libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

def connect(family, address):
    with socket.socket(family) as client:
        client.connect(address)

attempts = {
    "read": lambda: open(f"{folder}/secret"),
    "read the image": lambda: open(f"{folder}/disk.qcow2", "rb"),
    "write": lambda: open(f"{folder}/secret", "r+"),
    "create": lambda: open(f"{folder}/new", "w"),
    "list": lambda: os.listdir(folder),
    "remove": lambda: os.unlink(f"{folder}/secret"),
    "rename": lambda: os.rename(f"{folder}/secret", f"{folder}/moved"),
    "mkdir": lambda: os.mkdir(f"{folder}/directory"),
    "symlink": lambda: os.symlink("x", f"{folder}/link"),
    "link": lambda: os.link(f"{folder}/secret", f"{folder}/link"),
    "chmod": lambda: os.chmod(f"{folder}/secret", 0o777),
    "chown": lambda: os.chown(f"{folder}/secret", 1, 1),
    "set an attribute": lambda: os.setxattr(f"{folder}/secret", "user.x", b"x"),
    "run a program": lambda: subprocess.run(["/bin/true"]),
    "run memory": lambda: subprocess.run([f"/proc/self/fd/{memory}"], pass_fds=[memory]),
    "connect by TCP": lambda: connect(socket.AF_INET, ("127.0.0.1", int(tcp))),
    "a socket of another kind": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "connect to an abstract socket": lambda: connect(socket.AF_UNIX, "\\0" + abstract),
    "signal": lambda: os.kill(int(process), signal.SIGUSR2),
    "look into a process": lambda: open(f"/proc/{process}/environ"),
    "ptrace": lambda: call("ptrace", 16, int(process), None, None),
    "mount": lambda: call("mount", b"tmpfs", folder.encode(), b"tmpfs", 0, None),
    "unmount": lambda: call("umount2", point.encode(), 2),
    "a namespace": lambda: call("unshare", 0x10000000),
    "another user": lambda: os.setuid(2),
}
memory = os.memfd_create("program")
os.write(memory, b"#!/bin/true\\n")
os.fchmod(memory, 0o755)

def attempt():
    came_of = {}
    for name, act in attempts.items():
        if only and name not in only.split(", "):
            continue
        try:
            act()
            came_of[name] = "succeeded"
        except OSError as error:
            came_of[name] = errno.errorcode[error.errno]
    return came_of

def snapshot(session):
    found = {"main": attempt()}
    thread = threading.Thread(target=lambda: found.update(new=attempt()))
    thread.start()
    thread.join()
    return found

imagofs.fuse.session.snapshot = snapshot
sys.exit(main([sys.argv[1], point, "-o", sys.argv[3]]))
"""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[MountImage]:
    with mounting(tmp_path) as mount_image:
        yield mount_image


def run(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def attempts_of_a_daemon(image: Path, options: str, only: str = "") -> dict[str, dict[str, str]]:
    folder = image.parent
    point = folder / "point"
    point.mkdir()
    (folder / "secret").write_text("secret")
    abstract = f"imagofs-test-{os.getpid()}"
    command = ["sh", "-c", "trap '' USR2; echo; read line"]
    pipe = subprocess.PIPE
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        subprocess.Popen(command, stdin=pipe, stdout=pipe) as bystander,
    ):
        assert bystander.stdout is not None and bystander.stdout.readline()
        unix.bind("\0" + abstract)
        unix.listen()
        port = tcp.getsockname()[1]
        try:
            words = (image, point, options, folder, port, abstract, bystander.pid, only)
            done = run(_ATTEMPTS, *words)
            assert done.returncode == 0, done
            found: dict[str, dict[str, str]] = json.loads(os.getxattr(point, "user.imagofs.stats"))
            assert (folder / "secret").read_text() == "secret"
            assert (point / "disk.raw").read_bytes()[:2] == b"AA"
        finally:
            bystander.kill()
            imagofs("umount", point, ok=None)
    return found


@pytest.mark.parametrize("options", ["rw", "ro,setuid=1,channel=off"])
def test_no_way_out(new_image: NewImage, options: str) -> None:
    version = landlock_version()
    if not version:
        pytest.skip("this kernel has no landlock, or has it switched off")
    image = new_image("1M", "disk.qcow2", writes=["write -P 65 0 4k"])
    for where, found in attempts_of_a_daemon(image, f"{options},confine=on").items():
        if version < 6:  # it does not know of these yet
            found["connect to an abstract socket"] = found["signal"] = "EPERM"
        assert {found.pop("read"), found.pop("list")} == {"EACCES"}
        assert set(found.values()) <= {"EACCES", "EPERM", "EXDEV"}, (where, found)


def test_the_attempts_are_real(new_image: NewImage) -> None:
    """Without the confinement root gets out: the test above would notice."""
    image = new_image("1M", "disk.qcow2", writes=["write -P 65 0 4k"])
    only = "read, list, create, chmod, run a program, connect by TCP, signal, look into a process"
    only += ", connect to an abstract socket, a socket of another kind"
    found = attempts_of_a_daemon(image, "ro,confine=off", only)["main"]
    assert found == dict.fromkeys(only.split(", "), "succeeded")


def capabilities(status: str) -> dict[str, int]:
    lines = (line.split() for line in status.splitlines() if line.startswith("Cap"))
    return {words[0][3:-1]: int(words[1], 16) for words in lines}


def test_every_thread(new_image: NewImage, mount: MountImage) -> None:
    """No capabilities but two, and no new ones by running a program."""
    image = new_image("8M", "disk.qcow2", writes=["write -P 65 0 8M"])
    mounted = mount(image, "rw", "confine=on")
    assert mounted.file.read_bytes() == b"A" * (8 << 20)
    for thread in Path(f"/proc/{mounted.pid}/task").iterdir():
        status = (thread / "status").read_text()
        held = capabilities(status)
        assert not (held["Eff"] | held["Prm"]) & ~(1 << 24 | 1 << 2)
        assert not held["Inh"] and not held["Amb"]
        assert "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status


def test_the_helper_keeps_few_rights(new_image: NewImage, mount: MountImage) -> None:
    mounted = mount(new_image("1M"), "rw")
    (helper,) = Path(f"/proc/{mounted.pid}/task/{mounted.pid}/children").read_text().split()
    assert Path(f"/proc/{helper}/comm").read_text() == "imagofs-helper\n"
    held = capabilities(Path(f"/proc/{helper}/status").read_text())
    assert not (held["Eff"] | held["Prm"]) & ~(1 << 21 | 1 << 19 | 1 << 1 | 1 << 2)
    found = {os.readlink(fd) for fd in Path(f"/proc/{helper}/fd").iterdir()}
    assert {link.split(":")[0] for link in found} == {"/dev/null", "socket"}
    mounted.umount()
    assert not Path(f"/proc/{helper}").exists()


def test_the_helper_touches_no_other_mount(tmp_path: Path) -> None:
    script = """
import os, sys
from imagofs.privileges import Helper
from imagofs.fuse import mounts
helper = Helper()
for device in (None, "0:0", mounts.find_at("/").device):
    if device:
        helper.watch(device)
    for ask in (helper.detach, helper.is_severed):
        try:
            ask("/")
            print("done")
        except OSError as error:
            print(error.strerror)
helper.close()
"""
    done = run(script)
    assert done.stdout.splitlines() == ["not mounted by this daemon"] * 6, done


def test_threads_that_exist_already(tmp_path: Path) -> None:
    """Landlock belongs to a thread: those that trio keeps must not stay free."""
    script = """
import sys, threading, trio
from imagofs.confining import Confinement

def read(gate):
    gate.wait(20)
    try:
        with open(sys.argv[1]) as file:
            return file.read()
    except PermissionError:
        return "refused"

async def in_five_threads():
    gate = threading.Barrier(5)
    found = []
    async def one():
        found.append(await trio.to_thread.run_sync(read, gate))
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    print(*found)

async def main():
    await in_five_threads()
    print(await Confinement().enter())
    await in_five_threads()
    print(read(threading.Barrier(1)))

trio.run(main)
"""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    done = run(script, secret)
    if not landlock_version():
        pytest.skip("this kernel has no landlock, or has it switched off")
    assert done.stdout.split("\n") == [
        " ".join(["secret"] * 5), "", " ".join(["refused"] * 5), "refused", "",
    ]  # fmt: skip


def test_a_thread_that_is_not_trios(new_image: NewImage, tmp_path: Path) -> None:
    """It cannot be reached, and would be a way out."""
    script = """
import sys, threading
from imagofs.cli import main
from imagofs.daemon import _Daemon
mount = _Daemon._mount
def with_a_thread(*words):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    return mount(*words)
_Daemon._mount = with_a_thread
sys.exit(main(sys.argv[1:]))
"""
    image = new_image("1M", "disk.qcow2")
    point = tmp_path / "point"
    point.mkdir()
    done = run(script, image, point, "-o", "confine=on")
    assert done.returncode == 1 and "in all threads" in done.stderr
    assert done.stderr.count("\n") == 1 and mount_at(point) is None
    qemu.qemu_io(image, "write 0 512")  # nobody has it open
    done = run(script, image, point, "-o", "confine=auto")
    assert (done.returncode, done.stderr) == (0, "")
    imagofs("umount", point)


_WITHOUT_LANDLOCK = """
import sys
import imagofs.confining
from imagofs.cli import main
imagofs.confining.landlock_version = lambda: 0
sys.exit(main(sys.argv[1:]))
"""


def test_a_kernel_without_landlock(new_image: NewImage, tmp_path: Path) -> None:
    """What can be given up is; confine=on refuses, and leaves nothing mounted."""
    image = new_image("1M", "disk.qcow2", writes=["write -P 65 0 4k"])
    point = tmp_path / "point"
    point.mkdir()
    done = run(_WITHOUT_LANDLOCK, image, point, "-o", "confine=on")
    assert done.returncode == 1 and "has no landlock" in done.stderr
    assert "confine=auto" in done.stderr and done.stderr.count("\n") == 1
    assert mount_at(point) is None
    done = run(_WITHOUT_LANDLOCK, image, point, "-o", "confine=auto")
    assert (done.returncode, done.stderr) == (0, "")
    try:
        assert (point / "disk.raw").read_bytes()[:2] == b"AA"
        process = json.loads(imagofs("stat", "--json", point).stdout)["process"]
        held = capabilities(Path(f"/proc/{process}/status").read_text())
        assert not held["Eff"] & ~(1 << 24 | 1 << 2)
    finally:
        imagofs("umount", point)


def test_modules_are_there_when_they_are_needed(new_image: NewImage, tmp_path: Path) -> None:
    """A compressed cluster, an unaligned request: met long after the daemon gave its rights up."""
    image = new_image("1M", "disk.qcow2", writes=["write -c -P 65 0 64k"])
    point = tmp_path / "point"
    point.mkdir()
    for options in ("rw", "rw,direct_io", "rw,channel=off"):
        imagofs(image, point, "-o", f"{options},confine=on")
        try:
            with (point / "disk.raw").open("r+b", buffering=0) as file:
                assert file.read(2) == b"AA"
                os.pwrite(file.fileno(), b"new", 70001)
                assert os.pread(file.fileno(), 5, 70000) == b"\0new\0"
        finally:
            imagofs("umount", point)
