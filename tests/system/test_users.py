"""Ordinary users, and daemons that run as one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import NewImage
from tests.system import namespaces
from tests.system.namespaces import PROGRAM

#: Two users in an /etc of their own, and a /dev/fuse that everybody may open, as udev makes it.
#: The interpreter may be below a directory that only root gets into (/root): in the namespace it
#: has other permissions.
_USERS = """
mount -t tmpfs tmpfs /mnt
cp -a /etc/. /mnt/
mount --bind /mnt /etc
umount /mnt
mknod -m 666 /etc/fuse-device c 10 229
mount --bind /etc/fuse-device /dev/fuse
printf '%s' "${FUSE_CONF:-}" >/etc/fuse.conf
useradd -M -d / anna; useradd -M -d / otto
for folder in $HIDDEN; do
    mount -t tmpfs tmpfs /mnt
    mkdir /mnt/upper /mnt/work
    mount -t overlay -o lowerdir="$folder",upperdir=/mnt/upper,workdir=/mnt/work overlay "$folder"
    chmod o+x "$folder"
    umount -l /mnt
done
as() { local user=$1; shift; setpriv --reuid "$user" --regid "$user" --init-groups -- "$@"; }
mkdir /run/place
cp disk.qcow2 /run/place/disk.qcow2
chown -R anna: /run/place
chmod 755 /run/place
cd /run/place
as anna mkdir mnt
"""


_HIDDEN = " ".join(
    str(folder)
    for folder in {*PROGRAM.parents, *PROGRAM.with_name("python").resolve().parents}
    if not folder.stat().st_mode & 0o001
)


def succeeds(script: str, folder: Path, **environment: str) -> str:
    return namespaces.succeeds(_USERS + script, folder, HIDDEN=_HIDDEN, **environment)


def fails(script: str, folder: Path) -> str:
    """What a script prints to stderr that must fail with 1."""
    done = namespaces.in_namespaces(_USERS + script, folder, HIDDEN=_HIDDEN)
    assert done.returncode == 1, done
    return done.stderr


@pytest.fixture
def image(new_image: NewImage) -> Path:
    return new_image("1M", "disk.qcow2", writes=["write -P 65 0 4k"])


def test_who_may_not_keep_processors_awake(image: Path, tmp_path: Path) -> None:
    errors = fails('as anna "$IMAGOFS" disk.qcow2 mnt -o awake=on,overlay=own.qcow2', tmp_path)
    assert errors.startswith("imagofs: /dev/cpu_dma_latency: cannot keep processors awake: ")
    succeeds(
        """
        no as anna "$IMAGOFS" disk.qcow2 mnt -o awake=on,overlay=own.qcow2 2>/dev/null
        no test -e own.qcow2
        as anna "$IMAGOFS" disk.qcow2 mnt -o awake=auto
        as anna "$IMAGOFS" umount mnt
        """,
        tmp_path,
    )


def test_mount_read_unmount(image: Path, tmp_path: Path) -> None:
    output = succeeds(
        """
        as anna "$IMAGOFS" disk.qcow2 mnt -o rw
        as anna head -c 2 mnt/disk.raw
        as anna sh -c 'printf new | dd of=mnt/disk.raw conv=notrunc status=none'
        # Nobody else gets in: neither another user nor root.
        no as otto ls mnt 2>/dev/null
        no ls mnt 2>/dev/null
        no losetup -f mnt/disk.raw 2>/dev/null
        # Another user cannot unmount it either.
        no as otto "$IMAGOFS" umount mnt 2>/dev/null
        as anna "$IMAGOFS" umount mnt
        no pgrep -x imagofs
        qemu-img convert -O raw disk.qcow2 flat
        head -c 4 flat
        as anna "$IMAGOFS" disk.qcow2 mnt
        # Root may always unmount, and waits for the daemon too.
        "$IMAGOFS" umount mnt
        no pgrep -x imagofs
        """,
        tmp_path,
    )
    assert output == "AAnewA"


def test_signals_and_stale_mounts(image: Path, tmp_path: Path) -> None:
    succeeds(
        """
        as anna "$IMAGOFS" disk.qcow2 mnt
        pkill -x imagofs
        while pgrep -x imagofs >/dev/null; do sleep 0.02; done
        no findmnt mnt
        as anna "$IMAGOFS" disk.qcow2 mnt
        pkill -KILL -x imagofs
        while pgrep -x imagofs >/dev/null; do sleep 0.02; done
        findmnt mnt
        as anna "$IMAGOFS" disk.qcow2 mnt
        as anna head -c 1 mnt/disk.raw
        [ "$(findmnt -no TARGET mnt | wc -l)" = 1 ]
        as anna fusermount3 -u mnt
        """,
        tmp_path,
    )


def test_allow_other(image: Path, tmp_path: Path) -> None:
    stderr = fails('as anna "$IMAGOFS" disk.qcow2 mnt -o allow_other,mode=444', tmp_path)
    assert "user_allow_other" in stderr and "/etc/fuse.conf" in stderr and stderr.count("\n") == 1
    output = succeeds(
        """
        as anna "$IMAGOFS" disk.qcow2 mnt -o allow_other,mode=444
        as otto head -c 2 mnt/disk.raw
        head -c 2 mnt/disk.raw
        as anna "$IMAGOFS" umount mnt
        """,
        tmp_path,
        FUSE_CONF="user_allow_other\n",
    )
    assert output == "AAAA"


def test_mount_8_with_option_user(image: Path, tmp_path: Path) -> None:
    """mount(8) itself gives its rights up before it runs the helper."""
    if not os.stat("/bin/mount").st_mode & 0o4000:
        pytest.skip("mount(8) is not set-user-ID here: no user can mount what fstab lists")
    output = succeeds(
        """
        echo "/run/place/disk.qcow2 /run/place/mnt imagofs user,noauto 0 0" >/etc/fstab
        no as otto mount mnt 2>/dev/null
        as anna mount mnt
        findmnt -no OPTIONS mnt
        as anna head -c 2 mnt/disk.raw
        as anna umount mnt
        no pgrep -x imagofs
        """,
        tmp_path,
    )
    options, data = output.splitlines()
    assert {"nosuid", "nodev", "noexec", "rw"} <= set(options.split(",")) and data == "AA"


@pytest.mark.parametrize("channel", ["on", "off"])
def test_setuid(image: Path, tmp_path: Path, channel: str) -> None:
    """The image is root's alone; the daemon is not root's, and still unmounts at SIGTERM."""
    output = succeeds(
        f"""
        qemu-io -c "write -c -P 66 64k 64k" disk.qcow2 >/dev/null
        chown root: disk.qcow2; chmod 600 disk.qcow2
        "$IMAGOFS" disk.qcow2 mnt -o rw,setuid=otto,uid=anna,channel={channel}
        stat -c %U mnt/disk.raw
        # Where otto cannot get at the modules (nobody can) they are not needed any more.
        mount -t tmpfs tmpfs "$(dirname "$IMAGOFS")/../lib"
        cmp <(dd if=mnt/disk.raw bs=64k skip=1 count=1 status=none) \\
            <(head -c 64k /dev/zero | tr '\\0' B)
        umount "$(dirname "$IMAGOFS")/../lib"
        printf new | dd of=mnt/disk.raw conv=notrunc status=none
        ps -o user=,comm= -C imagofs,imagofs-helper | sort | xargs echo
        grep -hE '^(Cap(Eff|Prm|Inh|Amb)|Groups)' $(pgrep -x imagofs | sed 's|.*|/proc/&/status|')
        kill $(pgrep -u otto -x imagofs)
        while pgrep -x imagofs >/dev/null; do sleep 0.02; done
        no findmnt mnt
        "$IMAGOFS" disk.qcow2 mnt -o rw,setuid=otto
        "$IMAGOFS" umount mnt
        no pgrep -x imagofs
        qemu-img convert -O raw disk.qcow2 flat
        head -c 4 flat
        """,
        tmp_path,
    )
    owner, processes, groups, *capabilities, data = output.splitlines()
    assert owner == "anna" and data == "newA"
    assert processes == "otto imagofs root imagofs-helper"
    assert len(groups.split()) == 2  # otto's own
    assert [line.split()[1] for line in capabilities] == ["0" * 16] * 4


def test_setuid_is_for_root(image: Path, tmp_path: Path) -> None:
    stderr = fails('as anna "$IMAGOFS" disk.qcow2 mnt -o setuid=otto', tmp_path)
    assert "setuid" in stderr and stderr.count("\n") == 1
