"""A real systemd as process 1 of namespaces of its own, with only the units under test.

It has its own /run, /etc, /sbin, /srv, /mnt and cgroup; the rest of the file system is the host's.
Everything in it is gone when it is stopped, even where a test failed: its processes are killed with
its process 1, and its mounts go with them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.system.namespaces import LET_GO, PROGRAM

SYSTEMD = next(
    (
        path
        for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
        if os.access(path, os.X_OK)
    ),
    "/usr/lib/systemd/systemd",
)
JOURNALD = f"{SYSTEMD}-journald"
TIMEOUT_SECONDS = 60.0

_BOOT = r"""
set -eu
mount -t proc proc /proc
mount -t tmpfs tmpfs /mnt
mkdir /mnt/sbin /mnt/etc
sbin=$(realpath /sbin)
cp -a "$sbin/." /mnt/sbin/
cp -a /etc/. /mnt/etc/
mount --bind /mnt/sbin "$sbin"
mount --bind /mnt/etc /etc
umount -l /mnt
mount -t tmpfs tmpfs /mnt
mount -t tmpfs tmpfs /srv
mount -t tmpfs -o mode=755 tmpfs /run
case $FOLDER:$IMAGOFS in
/tmp/* | *:/tmp/*) ;; # it would hide what the tests need
*) mount -t tmpfs -o mode=1777 tmpfs /tmp ;;
esac
mount -t tmpfs tmpfs /sys/fs/cgroup # the kernel refuses to mount cgroup2 right upon cgroup2
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --bind /dev/null /dev/console
rm -rf /etc/systemd /etc/imagofs
mkdir /etc/systemd /etc/imagofs
printf '[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=\nForwardToSyslog=no\n' \
    >/etc/systemd/journald.conf
printf '%s\n' 0123456789abcdef0123456789abcdef >/etc/machine-id
mkdir /run/lock
"$IMAGOFS" install-helpers >/dev/null
unset IMAGOFS
exec "$SYSTEMD" --system --unit=imagofs-test.target --log-target=journal --show-status=no
"""

_TARGET = "[Unit]\nDefaultDependencies=no\n"
_UNITS = {
    **{
        f"{name}.target": _TARGET
        for name in ("sysinit", "basic", "local-fs", "remote-fs", "multi-user", "network")
    },
    **{
        f"{name}.target": f"{_TARGET}RefuseManualStart=no\n"
        for name in ("shutdown", "umount", "sockets")
    },
    "imagofs-test.target": f"{_TARGET}Wants=journald.socket journald.service\n"
    "After=journald.service\nAllowIsolate=yes\n",
    "journald.socket": f"{_TARGET}[Socket]\nListenDatagram=/run/systemd/journal/socket\n"
    "ListenStream=/run/systemd/journal/stdout\nPassCredentials=yes\nPassSecurity=yes\n"
    "Service=journald.service\nTimestamping=us\n",
    "journald.service": f"{_TARGET}Requires=journald.socket\nAfter=journald.socket\n"
    f"[Service]\nType=notify\nExecStart={JOURNALD}\nSockets=journald.socket\n"
    "StandardOutput=null\nFileDescriptorStoreMax=4224\n",
}


class Machine:
    """A systemd that runs.

    Args:
        pid: Its process 1, as this process sees it.
        units: The only folder where it looks for units.
    """

    def __init__(self, pid: int, units: Path) -> None:
        self.pid = pid
        self.units = units

    def run(self, *words: str | Path, ok: int | None = 0) -> str:
        """Run a command inside; returns what it printed. `ok` is its exit code (None: any)."""
        command = ["nsenter", "-t", str(self.pid), "-r", "-m", "-p", "-C", "-u", "-i", "--"]
        done = subprocess.run(
            [*command, *map(str, words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "SYSTEMD_PAGER": ""},
        )
        if ok is not None and done.returncode != ok:
            raise AssertionError(
                f"{' '.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}"
                f"\n{self.run('journalctl', '-q', '-n', '30', ok=None)}"
            )
        return done.stdout

    def sh(self, script: str, ok: int | None = 0) -> str:
        """Run a shell script inside."""
        return self.run("bash", "-euc", script, ok=ok)

    def systemctl(self, *words: str, ok: int | None = 0) -> str:
        """Run systemctl inside."""
        return self.run("systemctl", *words, ok=ok)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", "--value", "-p", name, unit).strip()

    def wait_for(self, unit: str, name: str, value: str, seconds: float = 20.0) -> None:
        """Wait until a property of a unit has a value."""
        deadline = time.monotonic() + seconds
        while (found := self.show(unit, name)) != value:
            assert time.monotonic() < deadline, f"{unit}: {name} stays {found}"
            time.sleep(0.05)

    def journal(self, unit: str) -> list[tuple[int, str]]:
        """(priority, line) of what a unit's processes logged."""
        self.run("journalctl", "--sync", ok=None)
        output = self.run("journalctl", "-q", "-o", "json", f"_SYSTEMD_UNIT={unit}", ok=None)
        records: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
        return [(int(record["PRIORITY"]), str(record["MESSAGE"])) for record in records]

    def configure(self, name: str, **settings: str | Path) -> None:
        """Write /etc/imagofs/NAME.conf."""
        text = "".join(f"{key}={value}\n" for key, value in settings.items())
        self.sh(f"cat >/etc/imagofs/{name}.conf <<'EOF'\n{text}EOF")

    def mounts(self) -> list[str]:
        """Mountpoints that process 1 sees."""
        lines = Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()
        return [line.split(" ")[4] for line in lines]


def _cgroup2() -> Path:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    raise AssertionError("no cgroup2 file system is mounted here: systemd needs one")


def _remove_cgroup(folder: Path) -> None:
    deadline = time.monotonic() + 10
    while folder.exists():
        try:
            for found, _, _ in os.walk(folder, topdown=False):
                os.rmdir(found)
        except OSError:  # a process in it has not quite ended
            assert time.monotonic() < deadline, f"{folder} is not empty"
            time.sleep(0.02)


def _only_child(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


@contextmanager
def booted(folder: Path, units: dict[str, str]) -> Iterator[Machine]:
    """A systemd that has reached its target.

    Args:
        folder: For its files.
        units: Further units, name to text.
    """
    place = folder / "units"
    place.mkdir()
    for name, text in {**_UNITS, **units}.items():
        (place / name).write_text(text)
    subprocess.run(
        [PROGRAM, "install-units", "--root", folder], check=True, stdout=subprocess.DEVNULL
    )
    for unit in folder.glob("usr/local/lib/systemd/system/*"):
        shutil.copy(unit, place)
    group = Path(tempfile.mkdtemp(prefix="imagofs-test-", dir=_cgroup2()))
    unshare = "unshare --fork --kill-child --pid --mount --propagation private --cgroup --uts --ipc"
    die = "setpriv --pdeathsig KILL"  # also when this process is killed
    join = f'echo $$ >"{group}/cgroup.procs"; exec {die} {unshare} bash -c "$BOOT"'
    with (folder / "boot.log").open("w+") as log:
        process = subprocess.Popen(
            ["bash", "-euc", join],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={
                "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "BOOT": f"{LET_GO}\n{_BOOT}",
                "FOLDER": str(folder),
                "IMAGOFS": str(PROGRAM),
                "SYSTEMD": SYSTEMD,
                "SYSTEMD_UNIT_PATH": str(place),
                "container": "imagofs-test",
            },
        )
        try:
            yield _wait_for_boot(process, place, log.name)
        finally:
            _detach_loop_devices(process)
            # Its child, process 1 of the namespaces, is killed with it, and everything inside too.
            process.send_signal(signal.SIGKILL)
            process.wait()
            _remove_cgroup(group)


def _detach_loop_devices(process: subprocess.Popen[bytes]) -> None:
    """Loop devices are the whole kernel's: they do not go with the namespaces."""
    pid = _only_child(process.pid) if process.poll() is None else None
    for link in Path(f"/proc/{pid}/root/run/imagofs-loop").glob("*/disk"):
        subprocess.run(["losetup", "-d", os.readlink(link)], capture_output=True)


def _wait_for_boot(process: subprocess.Popen[bytes], units: Path, log: str) -> Machine:
    deadline = time.monotonic() + 30
    while True:
        assert process.poll() is None, Path(log).read_text()
        assert time.monotonic() < deadline, f"systemd does not come up\n{Path(log).read_text()}"
        pid = _only_child(process.pid)
        if pid is not None and Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
            machine = Machine(pid, units)
            state = machine.run("systemctl", "is-active", "imagofs-test.target", ok=None)
            if state.strip() == "active":
                return machine
        time.sleep(0.05)
