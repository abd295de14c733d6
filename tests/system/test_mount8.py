"""mount(8), umount(8) and fstab, in mount namespaces of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import qemu
from tests.conftest import NewImage
from tests.system.namespaces import in_namespaces, succeeds


@pytest.fixture
def image(new_image: NewImage) -> Path:
    return new_image("4M", "disk.qcow2", writes=["write -P 7 0 64k"])


def fstab_field(path: Path) -> str:
    return str(path).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011")


@pytest.mark.parametrize("kind", ["imagofs", "fuse.imagofs"])
def test_both_types_by_hand(image: Path, tmp_path: Path, kind: str) -> None:
    output = succeeds(
        f"""
        mkdir mnt
        mount -t {kind} disk.qcow2 mnt -o ro,nosuid,nodev,noexec,noauto,_netdev,x-a.b=c,user
        findmnt -no FSTYPE,OPTIONS mnt
        cmp -n 65536 mnt/disk.raw <(head -c 65536 /dev/zero | tr '\\0' '\\7')
        no touch mnt/disk.raw 2>/dev/null
        umount mnt
        no pgrep -x imagofs
        mount -t {kind} disk.qcow2 mnt
        printf new | dd of=mnt/disk.raw conv=notrunc status=none
        umount mnt
        """,
        tmp_path,
    )
    words = output.split()
    assert words[0] == "fuse.imagofs"
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(words[1].split(","))
    assert "read 3/3" in qemu.qemu_io(image, "read -P 110 0 1", "read 0 3")


def test_fstab(image: Path, new_image, tmp_path: Path) -> None:
    """Every line of it, whatever letters its paths have; then what umount leaves behind."""
    names = ["plain", "with blank", "with,comma", "ünïcödé 磁盘", "quo'te", "back\\slash", "ha#sh"]
    lines = [
        f"{fstab_field(tmp_path / 'missing.qcow2')} {fstab_field(tmp_path)} imagofs nofail 0 0"
    ]
    for number, name in enumerate(names):
        disk = new_image("1M", f"{name}.qcow2", writes=[f"write -P {number + 1} 0 4k"])
        point = tmp_path / f"mnt {name}"
        point.mkdir()
        kind = ("imagofs", "fuse.imagofs")[number % 2]
        options = ("defaults", "ro,noatime", "rw,comment=x,user", "defaults,nofail")[number % 4]
        lines.append(f"{fstab_field(disk)} {fstab_field(point)} {kind} {options} 0 0")
    (tmp_path / "fstab").write_text("\n".join(lines) + "\n")
    output = succeeds(
        """
        mount -a -T fstab
        mount -a -T fstab    # what is mounted already is left alone
        for point in mnt*; do
            cat "$point"/*.raw | od -An -tu1 -N1
            findmnt -no OPTIONS "$point" | cut -c1-2
            umount "$point"
        done
        no findmnt_here
        no pgrep -x imagofs
        """,
        tmp_path,
    )
    found = sorted(tuple(words) for words in zip(*[iter(output.split())] * 2, strict=True))
    wanted = [(str(n + 1), "ro" if n % 4 == 1 else "rw") for n in range(len(names))]
    assert found == sorted(wanted)


def test_mount_by_mountpoint_alone(image: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "fstab").write_text(f"{image} {tmp_path}/mnt imagofs noauto,ro 0 0\n")
    succeeds("mount -a -T fstab; no findmnt mnt; mount -T fstab mnt; findmnt mnt", tmp_path)


def test_a_missing_image(image: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    for options, code in (("nofail", 0), ("ro,nofail", 0), ("ro", 32), ("bogus", 1)):
        for kind in ("imagofs", "fuse.imagofs"):
            done = in_namespaces(f"mount -t {kind} missing mnt -o {options}", tmp_path)
            assert done.returncode == code, done
            assert bool(done.stderr) == bool(code)
            assert not code or done.stderr.startswith("imagofs: ")
    # What is there and cannot be mounted is not missing.
    (tmp_path / "cut.qcow2").write_bytes(image.read_bytes()[:60])
    done = in_namespaces("mount -t imagofs cut.qcow2 mnt -o nofail", tmp_path)
    assert done.returncode == 32 and "cut.qcow2" in done.stderr


def test_sloppy_and_fake(image: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    succeeds("mount -f -t imagofs disk.qcow2 mnt; no findmnt mnt", tmp_path)
    succeeds("mount -s -t imagofs disk.qcow2 mnt -o bogus; findmnt mnt", tmp_path)
    succeeds("mount -v -n -r -t imagofs disk.qcow2 mnt; findmnt -O ro mnt", tmp_path)


def test_quoted_commas_in_options(image: Path, tmp_path: Path) -> None:
    output = succeeds(
        """
        mkdir mnt
        mount -t imagofs disk.qcow2 mnt -o 'ro,fsname="a,b",name=the\\,disk'
        ls mnt; findmnt -no SOURCE mnt
        """,
        tmp_path,
    )
    assert output.splitlines() == ["the,disk", "a,b"]


def test_remount(image: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "fstab").write_text(f"{image} {tmp_path}/mnt imagofs allow_other 0 0\n")
    output = succeeds(
        """
        mount -a -T fstab
        printf new >data
        printf old | dd of=mnt/disk.raw conv=notrunc status=none
        exec 5>>mnt/disk.raw
        no mount -o remount,ro mnt 2>busy
        exec 5>&-
        mount -o remount,ro mnt
        findmnt -no OPTIONS mnt
        no dd if=data of=mnt/disk.raw conv=notrunc status=none 2>/dev/null
        mount -T fstab -o remount,rw,noexec mnt
        findmnt -no OPTIONS mnt
        printf 2nd | dd of=mnt/disk.raw conv=notrunc status=none
        umount mnt
        mount -t imagofs -o ro disk.qcow2 mnt
        no mount -o remount,rw mnt 2>refused
        no mount -o remount,r0 mnt 2>unknown
        mount -s -o remount,ro,r0 mnt
        findmnt -no OPTIONS mnt
        """,
        tmp_path,
    )
    first, second, third = (line.split(",") for line in output.splitlines())
    assert "ro" in first and "rw" in second and "noexec" in second and "ro" in third
    assert "open for writing" in (tmp_path / "busy").read_text()
    assert "open read-only" in (tmp_path / "refused").read_text()
    assert "unknown option 'r0'" in (tmp_path / "unknown").read_text()
    assert qemu.contents(image)[:3] == b"2nd"


def test_umount_waits_for_the_daemon(image: Path, tmp_path: Path) -> None:
    """Without the helper it does not: the daemon is stopped while umount(8) runs."""
    succeeds(
        """
        mkdir mnt
        mount -t imagofs disk.qcow2 mnt -o writeback
        head -c 1M /dev/urandom >data
        dd if=data of=mnt/disk.raw conv=notrunc status=none
        daemon=$(pgrep -x imagofs)
        umount mnt
        no kill -0 "$daemon" 2>/dev/null
        qemu-img convert -O raw disk.qcow2 flat
        cmp -n 1048576 flat data
        mount -t imagofs disk.qcow2 mnt
        daemon=$(pgrep -x imagofs)
        kill -STOP "$daemon"
        umount mnt &
        sleep 0.5
        kill -0 $!
        kill -CONT "$daemon"
        wait $!
        no kill -0 "$daemon" 2>/dev/null
        """,
        tmp_path,
    )


@pytest.mark.parametrize(
    "mount",
    [
        '"$IMAGOFS" disk.qcow2 "the mnt" -o rw',
        '"$IMAGOFS" disk.qcow2 "the mnt" -o setuid=nobody,fsname=other',
        'mount -t imagofs disk.qcow2 "the mnt"',
        'mount -t imagofs disk.qcow2 "the mnt" -o _netdev,x-mine',
    ],
    ids=["imagofs", "setuid", "mount8", "options"],
)
def test_umount_waits_given_an_absolute_path(image: Path, tmp_path: Path, mount: str) -> None:
    """As systemd and careful people give it: umount(8) has its own way to learn the type then."""
    succeeds(
        f"""
        mkdir "the mnt"
        {mount}
        daemon=$(pgrep -x imagofs)
        kill -STOP "$daemon"
        umount "$PWD/the mnt" &
        sleep 0.5
        kill -0 $!
        kill -CONT "$daemon"
        wait $!
        no kill -0 "$daemon" 2>/dev/null
        no grep . /run/mount/utab
        """,
        tmp_path,
    )


def test_table_of_umount(image: Path, tmp_path: Path) -> None:
    """However a mount ends, nothing of it stays in the table, and nobody else's line is touched."""
    output = succeeds(
        """
        mkdir mnt other
        table() { sed "s#$PWD/##g; s/^ID=[0-9]* //" /run/mount/utab; }
        mount -t tmpfs -o x-theirs tmpfs other
        theirs=$(table)
        mount -t imagofs disk.qcow2 mnt -o x-mine
        table
        mount -o remount,ro mnt
        "$IMAGOFS" umount mnt
        test "$(table)" = "$theirs"
        "$IMAGOFS" disk.qcow2 mnt
        pkill -x imagofs
        while pgrep -x imagofs >/dev/null; do sleep 0.02; done
        test "$(table)" = "$theirs"
        "$IMAGOFS" disk.qcow2 mnt
        pkill -KILL -x imagofs
        while pgrep -x imagofs >/dev/null; do sleep 0.02; done
        "$IMAGOFS" disk.qcow2 mnt 2>/dev/null
        test "$(table | wc -l)" -eq 2
        umount -i mnt
        test "$(table)" = "$theirs"
        while pgrep -x imagofs >/dev/null; do sleep 0.02; done
        "$IMAGOFS" disk.qcow2 mnt
        umount -f "$PWD/mnt"
        test "$(table)" = "$theirs"
        mount -t tmpfs -o x-theirs tmpfs mnt
        "$IMAGOFS" disk.qcow2 mnt
        "$IMAGOFS" umount mnt
        table
        """,
        tmp_path,
    )
    theirs = "SRC=tmpfs TARGET=other ROOT=/ OPTS=x-theirs"
    assert output.splitlines() == [
        theirs,
        "SRC=imagofs TARGET=mnt ROOT=/ OPTS=x-imagofs",
        "SRC=disk.qcow2 TARGET=mnt ROOT=/ OPTS=x-mine",
        theirs,
        "SRC=tmpfs TARGET=mnt ROOT=/ OPTS=x-theirs",
    ]


def test_a_table_that_cannot_be_written(image: Path, tmp_path: Path) -> None:
    """The mount is there all the same, and without the helpers the table is left alone."""
    succeeds(
        """
        mkdir mnt
        touch /run/mount
        "$IMAGOFS" disk.qcow2 mnt
        umount mnt
        rm /run/mount
        rm /sbin/umount.fuse.imagofs
        "$IMAGOFS" disk.qcow2 mnt
        no grep . /run/mount/utab 2>/dev/null
        "$IMAGOFS" umount mnt
        """,
        tmp_path,
    )


def test_ways_of_umount(image: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    done = in_namespaces(
        "mount -t imagofs disk.qcow2 mnt; exec 5<mnt/disk.raw; umount mnt", tmp_path
    )
    assert done.returncode == 32 and "in use by process" in done.stderr
    succeeds(
        """
        mount -t imagofs disk.qcow2 mnt
        exec 5<mnt/disk.raw
        umount -r mnt 2>/dev/null
        findmnt -O ro mnt
        umount -l mnt
        no findmnt mnt
        cmp -n 1 <(printf '\\7') - <&5
        exec 5<&-
        while pgrep -x imagofs >/dev/null; do sleep 0.02; done
        mount -t imagofs disk.qcow2 mnt
        exec 5<mnt/disk.raw
        umount -f mnt
        no findmnt mnt
        no pgrep -x imagofs
        """,
        tmp_path,
    )


def test_helpers_name_the_program_absolutely(tmp_path: Path) -> None:
    output = succeeds('"$IMAGOFS" install-helpers --prefix usr', tmp_path, PATH="/usr/bin:/bin")
    assert sorted(Path(line).name for line in output.splitlines()) == [
        "mount.fuse.imagofs",
        "mount.imagofs",
        "umount.fuse.imagofs",
    ]
    for line in output.splitlines():
        path = tmp_path / line
        assert path.stat().st_mode & 0o777 == 0o755
        assert "exec /" in path.read_text()
