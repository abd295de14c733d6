"""The units, under a real systemd: what they mount, log, survive, and leave on the disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imagofs.confining import landlock_version
from imagofs.fuse import wakefulness
from tests import qemu
from tests.mount.mounting import imagofs
from tests.system.machine import Machine, booted

EXAMPLES = Path(__file__).parents[2] / "systemd/examples"
INFO, WARNING, ERROR = 6, 4, 3
FILE_SYSTEM_BYTES = 12 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("systemd")


def ended(pid: str) -> str:
    """Shell commands that fail if a process runs. It may have ended and not be reaped yet."""
    return f"if grep -qs '^State:.[^ZX]' /proc/{pid}/status; then exit 1; fi"


def name_of(test: str, folder: Path) -> str:
    """An instance's name that no other run has: loop devices are the whole kernel's."""
    return f"{test}-{folder.parent.name}".replace("_", "")


@pytest.fixture(scope="module")
def machine(folder: Path) -> Iterator[Machine]:
    with with_examples(folder, name_of("vm", folder)) as running:
        yield running


@contextmanager
def with_examples(folder: Path, loop: str) -> Iterator[Machine]:
    """A machine with the example units, for the image vm.qcow2 in `folder`."""
    image = folder / "vm.qcow2"
    examples = {}
    for file in EXAMPLES.iterdir():
        text = file.read_text().replace("/var/lib/images/vm.qcow2", str(image))
        text = text.replace("imagofs-loop@vm", f"imagofs-loop@{loop}")
        examples[file.name] = text.replace("/run/imagofs-loop/vm/", f"/run/imagofs-loop/{loop}/")
    with booted(folder, examples) as running:
        yield running


def partitioned(path: Path) -> Path:
    """A qcow2 with an ext4 on its first partition and a second, empty one."""
    raw = path.with_suffix(".flat")
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.truncate(FILE_SYSTEM_BYTES)
    subprocess.run(["mkfs.ext4", "-q", part], check=True)
    with raw.open("wb") as file:
        file.truncate(16 << 20)
        file.seek(1 << 20)
        file.write(part.read_bytes())
    layout = f"label: gpt\nstart=2048, size={FILE_SYSTEM_BYTES // 512}\nsize=2048\n"
    subprocess.run(["sfdisk", "-q", raw], input=layout, text=True, check=True)
    qemu.qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    raw.unlink()
    part.unlink()
    return path


def is_calm(lines: list[tuple[int, str]]) -> bool:
    """Nothing but information, and no traceback."""
    return all(priority == INFO and "Traceback" not in line for priority, line in lines)


def test_verify(machine: Machine) -> None:
    own = sorted(machine.units.glob("imagofs*@.service"))
    assert len(own) == 2
    units = [str(path).replace("@.", "@x.") for path in own]
    units += [str(machine.units / file.name) for file in EXAMPLES.iterdir()]
    machine.sh("touch /etc/imagofs/x.conf")
    done = machine.run("systemd-analyze", "verify", "--man=no", *units)
    assert not done


def test_install(tmp_path: Path) -> None:
    """Beside the units there is the folder for their settings, and what is in it stays."""
    settings = tmp_path / "etc/imagofs/vm.conf"
    imagofs("install-units", "--root", tmp_path)
    settings.write_text("IMAGE=/vm.qcow2\n")
    imagofs("install-units", "--root", tmp_path)
    assert settings.read_text() == "IMAGE=/vm.qcow2\n"
    settings.unlink()
    settings.parent.rmdir()
    settings.parent.write_text("")
    assert "etc/imagofs: cannot make" in imagofs("install-units", "--root", tmp_path, ok=1).stderr


def test_mount(machine: Machine, folder: Path) -> None:
    """By default it is read-only, in /run/imagofs, and seen by process 1."""
    name = name_of("ro", folder)
    unit, point = f"imagofs@{name}.service", f"/run/imagofs/{name}"
    image = qemu.create(folder / "a disk.qcow2", "1M", writes=["write -P 65 0 512"])
    machine.configure(name, IMAGE=f'"{image}"')
    machine.systemctl("start", unit)
    assert point in machine.mounts()
    assert machine.sh(f"head -c 3 {point}/*.raw; ls {point}") == "AAAa disk.raw\n"
    assert "(qcow2, ro)" in machine.show(unit, "StatusText")
    machine.sh(f"if touch {point}/*.raw; then exit 1; fi")
    machine.systemctl("reload-or-restart", unit)
    pid = machine.show(unit, "MainPID")
    machine.sh(f"kill -HUP {pid}; kill -USR1 {pid}; head -c 1 {point}/*.raw")
    machine.systemctl("stop", unit)
    assert point not in machine.mounts()
    machine.sh(ended(pid))
    assert machine.show(unit, "Result") == "success"
    lines = machine.journal(unit)
    assert is_calm(lines), lines
    text = "\n".join(line for _, line in lines)
    assert text.count(f"{point}: mounted {image}") == 2
    assert text.count("everything is on the disk") == 2
    assert " reads of " in text  # SIGUSR1


def test_no_mount_namespace(machine: Machine, folder: Path) -> None:
    """Hardened, and still in process 1's namespace of mounts, with no more rights than needed."""
    name = name_of("ns", folder)
    image = qemu.create(folder / "ns.qcow2", "1M")
    options = "rw"
    if landlock_version():
        options += ",confine=on"
    if os.access(wakefulness.DEVICE, os.W_OK):
        options += ",awake=on"  # or else the unit does not let it open the device
    machine.configure(name, IMAGE=image, OPTIONS=options)
    machine.systemctl("start", f"imagofs@{name}")
    pid = machine.show(f"imagofs@{name}", "MainPID")
    first, second = machine.sh(f"readlink /proc/1/ns/mnt /proc/{pid}/ns/mnt").split()
    assert first == second
    status = machine.sh(f"cat /proc/{pid}/status; cat /proc/{pid}/oom_score_adj")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["NoNewPrivs"].strip() == "1" and fields["Seccomp"].strip() == "2"
    # DAC_OVERRIDE, DAC_READ_SEARCH, SETGID, SETUID, SYS_PTRACE, SYS_ADMIN, SYS_RESOURCE
    allowed = sum(1 << bit for bit in (1, 2, 6, 7, 19, 21, 24))
    assert not int(fields["CapBnd"], 16) & ~allowed
    # Once it serves it keeps two of them, and its own filter is on top of the unit's.
    assert not int(fields["CapPrm"], 16) & ~(1 << 2 | 1 << 24)
    assert int(fields["Seccomp_filters"]) >= 2
    if int(fields["CapBnd"], 16) & 1 << 24:  # some containers do not give SYS_RESOURCE to root
        assert status.splitlines()[-1] == "-900"
    machine.systemctl("stop", f"imagofs@{name}")


def test_as_another_user(machine: Machine, folder: Path) -> None:
    """It still tells systemd how it is, ends well, and leaves nothing mounted."""
    name = name_of("user", folder)
    unit, point = f"imagofs@{name}.service", f"/run/imagofs/{name}"
    image = qemu.create(folder / "user.qcow2", "1M")
    image.chmod(0o600)
    machine.configure(name, IMAGE=image, OPTIONS="rw,setuid=daemon")
    machine.systemctl("start", unit)
    pid = machine.show(unit, "MainPID")
    assert machine.sh(f"stat -c %U /proc/{pid}") == "daemon\n"
    machine.sh(f"printf data | dd of={point}/user.raw conv=notrunc status=none")
    assert "(qcow2, rw)" in machine.show(unit, "StatusText")
    machine.systemctl("stop", unit)
    assert machine.show(unit, "Result") == "success" and point not in machine.mounts()
    assert is_calm(machine.journal(unit)), machine.journal(unit)
    assert qemu.contents(image)[:4] == b"data"


def test_refused_image(machine: Machine, folder: Path) -> None:
    name = name_of("bad", folder)
    machine.configure(name, IMAGE=folder / "missing.qcow2")
    machine.systemctl("start", f"imagofs@{name}", ok=1)
    machine.systemctl("stop", f"imagofs@{name}")
    lines = machine.journal(f"imagofs@{name}.service")
    assert lines and lines[0][0] == ERROR and "missing.qcow2" in lines[0][1], lines
    assert not any("Traceback" in line for _, line in lines)


def test_loop_device_and_partition(machine: Machine, folder: Path) -> None:
    """One start brings up all three, one stop takes all three down, and nothing is lost."""
    name = name_of("vm", folder)
    image = partitioned(folder / "vm.qcow2")
    links = f"/run/imagofs-loop/{name}"
    machine.configure(name, IMAGE=image, OPTIONS="rw")
    machine.systemctl("start", "srv-vm.mount")
    assert machine.sh(f"cd {links}; ls") == "disk\npart1\npart2\n"
    device = machine.sh(f"readlink {links}/disk").strip()
    assert machine.sh(f"losetup -nO DIO,PARTSCAN {device}").split() == ["1", "1"]
    machine.sh("head -c 3M /dev/urandom >/srv/vm/data; md5sum </srv/vm/data >/srv/vm/sum")
    before = machine.sh("cat /srv/vm/sum")
    # Not synced by anybody: the order of the stops does it.
    machine.systemctl("stop", f"imagofs@{name}")
    assert not {"/srv/vm", f"/run/imagofs/{name}"} & set(machine.mounts())
    assert machine.sh("ls /run/imagofs-loop") == ""
    # Somebody else on this kernel may have the device by now.
    assert name not in machine.sh(f"losetup -n {device}", ok=None)
    assert machine.systemctl("is-active", f"imagofs-loop@{name}", ok=None) == "inactive\n"
    qemu.check(image)
    machine.systemctl("start", "srv-vm.mount")
    assert machine.sh("cat /srv/vm/sum; md5sum </srv/vm/data") == before * 2
    machine.systemctl("stop", "srv-vm.mount")
    part = machine.sh(f"fsck.ext4 -fn {links}/part1", ok=None)
    assert "clean" in part or "Pass 5" in part
    machine.systemctl("stop", f"imagofs@{name}")
    for unit in (f"imagofs@{name}.service", f"imagofs-loop@{name}.service"):
        assert is_calm(machine.journal(unit)), machine.journal(unit)


def test_crash(machine: Machine, folder: Path) -> None:
    """A killed daemon is noticed; the unit clears what it left, and mounts again."""
    name = name_of("crash", folder)
    unit, point = f"imagofs@{name}.service", f"/run/imagofs/{name}"
    image = qemu.create(folder / "crash.qcow2", "1M", writes=["write -P 66 0 512"])
    machine.configure(name, IMAGE=image, OPTIONS="rw")
    machine.systemctl("start", f"imagofs-loop@{name}")
    machine.systemctl("kill", "-s", "KILL", unit)
    machine.wait_for(unit, "NRestarts", "1")
    machine.wait_for(unit, "ActiveState", "active")
    assert machine.mounts().count(point) == 1
    assert machine.sh(f"head -c 2 {point}/*.raw") == "BB"
    # The device went with the daemon, which says that something may be lost, and can be had again.
    machine.wait_for(f"imagofs-loop@{name}.service", "SubState", "failed")
    assert "is lost" in machine.journal(f"imagofs-loop@{name}.service")[-1][1]
    machine.systemctl("start", f"imagofs-loop@{name}")
    assert machine.sh(f"head -c 2 /run/imagofs-loop/{name}/disk") == "BB"
    machine.systemctl("stop", unit)
    assert point not in machine.mounts()


def test_watchdog(machine: Machine, folder: Path) -> None:
    """A daemon that hangs is ended and started again."""
    name = name_of("dog", folder)
    unit = f"imagofs@{name}.service"
    image = qemu.create(folder / "dog.qcow2", "1M")
    machine.configure(name, IMAGE=image)
    machine.sh(
        f"mkdir -p {machine.units}/{unit}.d; "
        f"printf '[Service]\\nWatchdogSec=1\\n' >{machine.units}/{unit}.d/dog.conf"
    )
    machine.systemctl("daemon-reload")
    machine.systemctl("start", unit)
    machine.sh("sleep 1.5")
    assert machine.show(unit, "NRestarts") == "0"
    assert " reads of " in machine.show(unit, "StatusText")
    machine.systemctl("kill", "-s", "STOP", unit)
    machine.wait_for(unit, "NRestarts", "1")
    machine.wait_for(unit, "ActiveState", "active")
    machine.systemctl("stop", unit)


def test_stop_with_an_open_file(machine: Machine, folder: Path) -> None:
    """It says who holds it, and serves on until the last close; the stop waits."""
    name = name_of("open", folder)
    unit, point = f"imagofs@{name}.service", f"/run/imagofs/{name}"
    image = qemu.create(folder / "open.qcow2", "1M")
    machine.configure(name, IMAGE=image, OPTIONS="rw")
    machine.systemctl("start", unit)
    machine.sh(
        f"""
        exec 5<>{point}/open.raw
        systemctl stop --no-block {unit}
        while findmnt {point} >/dev/null; do sleep 0.05; done
        systemctl is-active {unit} | grep -q deactivating
        printf late >&5
        exec 5>&-
        systemctl stop {unit}
        """
    )
    lines = machine.journal(unit)
    assert [line for priority, line in lines if priority == WARNING and "still used by" in line]
    assert machine.show(unit, "Result") == "success"
    assert qemu.contents(image)[:4] == b"late"


def test_stop_timeout(machine: Machine, folder: Path) -> None:
    """Who never closes does not keep it: what was written is on the disk, and it ends well."""
    name = name_of("late", folder)
    unit, point = f"imagofs@{name}.service", f"/run/imagofs/{name}"
    image = qemu.create(folder / "late.qcow2", "1M")
    machine.configure(name, IMAGE=image, OPTIONS="rw,stop_timeout=1")
    machine.systemctl("start", unit)
    machine.sh(f"exec 5<>{point}/late.raw; printf data >&5; systemctl stop {unit}")
    assert machine.show(unit, "Result") == "success"
    assert qemu.contents(image)[:4] == b"data"


def test_mount_unit_and_automount(machine: Machine, folder: Path) -> None:
    """The examples with mount(8)'s helper; the stop of the unit waits for the flush."""
    image = folder / "vm.qcow2"
    qemu.create(image, "1M")
    machine.systemctl("start", "mnt-vm.automount")
    assert machine.show("mnt-vm.mount", "ActiveState") == "inactive"
    machine.sh("printf first | dd of=/mnt/vm/vm.raw conv=notrunc status=none")
    assert machine.show("mnt-vm.mount", "ActiveState") == "active"
    machine.systemctl("stop", "mnt-vm.automount", "mnt-vm.mount")
    assert "/mnt/vm" not in machine.mounts()
    assert qemu.contents(image)[:5] == b"first"
    machine.systemctl("start", "mnt-vm.mount")
    assert machine.sh("head -c 5 /mnt/vm/vm.raw") == "first"
    machine.systemctl("stop", "mnt-vm.mount")
    machine.sh("if pgrep -f '[m]ount.imagofs .*/mnt/vm'; then exit 1; fi")


def test_mount_unit_without_options(machine: Machine, folder: Path) -> None:
    """Its stop waits for the daemon, whatever mount(8) notes down of the mount or does not."""
    image = qemu.create(folder / "bare.qcow2", "1M")
    unit = f"[Mount]\nWhat={image}\nWhere=/mnt/bare\nType=imagofs\n"
    (machine.units / "mnt-bare.mount").write_text(unit)
    machine.systemctl("daemon-reload")
    machine.systemctl("start", "mnt-bare.mount")
    daemon = machine.sh("pgrep -f '[m]ount.imagofs .*/mnt/bare' | head -n 1").strip()
    machine.sh(
        f"printf data | dd of=/mnt/bare/bare.raw conv=notrunc status=none; kill -STOP {daemon}"
    )
    machine.systemctl("stop", "--no-block", "mnt-bare.mount")
    machine.wait_for("mnt-bare.mount", "ActiveState", "deactivating")
    machine.sh(f"sleep 0.5; kill -0 {daemon}")
    assert machine.show("mnt-bare.mount", "ActiveState") == "deactivating"
    machine.sh(f"kill -CONT {daemon}")
    machine.wait_for("mnt-bare.mount", "ActiveState", "inactive")
    machine.sh(ended(daemon))
    assert machine.show("mnt-bare.mount", "Result") == "success"
    assert qemu.contents(image)[:4] == b"data"


def test_umount_of_a_service(machine: Machine, folder: Path) -> None:
    """The hardened daemon tells umount(8) of its mount, and of its end."""
    name = name_of("umount", folder)
    unit, point = f"imagofs@{name}.service", f"/run/imagofs/{name}"
    machine.configure(name, IMAGE=qemu.create(folder / "umount.qcow2", "1M"), OPTIONS="rw")
    machine.systemctl("start", unit)
    daemon = machine.show(unit, "MainPID")
    machine.sh(f"umount {point}; {ended(daemon)}")
    machine.wait_for(unit, "ActiveState", "inactive")
    machine.systemctl("start", unit)
    machine.sh(f"grep -F TARGET={point} /run/mount/utab")
    machine.systemctl("stop", unit)
    machine.sh(f"if grep -F TARGET={point} /run/mount/utab; then exit 1; fi")
    assert is_calm(machine.journal(unit))


def test_shutdown(folder: Path, tmp_path: Path) -> None:
    """With everything up and a file system being written to: all is there afterwards."""
    name = name_of("shut", folder)
    image = partitioned(tmp_path / "vm.qcow2")
    with with_examples(tmp_path, name) as machine:
        machine.configure(name, IMAGE=image, OPTIONS="rw")
        machine.systemctl("start", "srv-vm.mount")
        machine.sh("seq 200000 >/srv/vm/data")
        machine.systemctl(
            "start", "--job-mode=replace-irreversibly", "umount.target", "shutdown.target"
        )
        for unit in ("srv-vm.mount", f"imagofs-loop@{name}.service", f"imagofs@{name}.service"):
            machine.wait_for(unit, "ActiveState", "inactive")
    qemu.check(image)
    flat = tmp_path / "flat"
    qemu.qemu_img("convert", "-f", "qcow2", "-O", "raw", image, flat)
    part = tmp_path / "part"
    part.write_bytes(flat.read_bytes()[1 << 20 : (1 << 20) + FILE_SYSTEM_BYTES])
    assert "clean" in qemu.run("e2fsck", "-n", part)
    assert qemu.run("debugfs", "-R", "cat data", part) == qemu.run("seq", "200000")
