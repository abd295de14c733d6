"""Odd places: where an image lies, where it is mounted, and what happens to either meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import qemu
from tests.conftest import NewImage
from tests.system.namespaces import succeeds

_FUNCTIONS = """
starts_with() { [ "$(head -c ${#1} "$2")" = "$1" ]; }
ended() { while pgrep -x imagofs >/dev/null; do sleep 0.02; done; }
write() { printf %s "$1" | dd of="$2" conv=notrunc status=none; }
"""


@pytest.fixture
def image(new_image: NewImage) -> Path:
    return new_image("1M", "disk.qcow2", writes=["write -P 65 0 64k"])


def test_names(image: Path, tmp_path: Path) -> None:
    """Whatever letters a name may have; each way to unmount finds it again."""
    succeeds(
        _FUNCTIONS
        + r"""
        for name in $'new\nline\ttab\r\\ #hash\xff%s,' -dash "q'uote\""; do
            mkdir "./$name"
            cp disk.qcow2 "./$name.qcow2"
            "$IMAGOFS" -- "$name.qcow2" "$name"
            starts_with AA "./$name/$name.raw"
            "$IMAGOFS" stat -- "$name" >/dev/null
            "$IMAGOFS" umount -- "$name"
            mount -t imagofs "./$name.qcow2" "./$name"
            umount -- "./$name"
            "$IMAGOFS" "./$name.qcow2" "./$name/"
            kill $(pgrep -x imagofs)
            ended
            no findmnt_here
        done
        """,
        tmp_path,
    )


def test_mounted_over_itself(image: Path, tmp_path: Path) -> None:
    """The image is hidden by its own disk, as a file or below the mountpoint."""
    succeeds(
        _FUNCTIONS
        + """
        "$IMAGOFS" disk.qcow2 disk.qcow2 -o rw
        starts_with AA disk.qcow2
        write new disk.qcow2
        "$IMAGOFS" umount disk.qcow2
        qemu-img check -q disk.qcow2
        "$IMAGOFS" disk.qcow2 . -o rw
        cd /; cd "$OLDPWD"
        starts_with newA disk.raw
        write older disk.raw
        cd /
        "$IMAGOFS" umount "$OLDPWD"
        """,
        tmp_path,
    )
    assert qemu.contents(image)[:6] == b"olderA"


def test_moved_bound_and_left(image: Path, tmp_path: Path) -> None:
    """The mount is not where the daemon mounted it, or in two places."""
    succeeds(
        _FUNCTIONS
        + """
        mkdir a b
        for end in 'umount b' 'umount -f b' 'kill $(pgrep -x imagofs)' '"$IMAGOFS" umount b'; do
            "$IMAGOFS" disk.qcow2 a -o rw
            mount --move a b
            starts_with AA b/disk.raw
            eval "$end"
            ended
            no findmnt b
        done
        "$IMAGOFS" disk.qcow2 a
        mount --bind a b
        umount a
        starts_with AA b/disk.raw
        umount b
        ended
        """,
        tmp_path,
    )


def test_the_image_changes_its_name(image: Path, tmp_path: Path) -> None:
    """Deleted or replaced under the mount: the one that was mounted is the one in use."""
    succeeds(
        _FUNCTIONS
        + """
        mkdir a b
        cp disk.qcow2 other
        "$IMAGOFS" disk.qcow2 a -o rw
        ln disk.qcow2 kept
        mv other disk.qcow2
        write new a/disk.raw
        "$IMAGOFS" disk.qcow2 b -o rw
        starts_with AA b/disk.raw
        "$IMAGOFS" umount a
        "$IMAGOFS" umount b
        "$IMAGOFS" kept a -o rw
        rm kept
        write 2nd a/kept.raw
        starts_with 2ndA a/kept.raw
        "$IMAGOFS" umount a
        [ ! -e kept ]
        """,
        tmp_path,
    )


def test_read_only_media(image: Path, tmp_path: Path) -> None:
    succeeds(
        _FUNCTIONS
        + """
        mkdir a media
        mount -t tmpfs tmpfs media
        cp disk.qcow2 media
        mount -o remount,ro media
        no "$IMAGOFS" media/disk.qcow2 a -o rw 2>error
        grep -qx "imagofs: $PWD/media/disk.qcow2: cannot open for writing: Read-only.*" error
        for options in ro overlay overlay=kept; do
            "$IMAGOFS" media/disk.qcow2 a -o $options
            [ $options = ro ] || write new a/disk.raw
            "$IMAGOFS" umount a
        done
        qemu-img convert -O raw kept flat
        starts_with newA flat
        """,
        tmp_path,
    )


def test_used_lazily(image: Path, tmp_path: Path) -> None:
    """Unmounted while it is open, it is still in use: nobody else may write to the image."""
    succeeds(
        _FUNCTIONS
        + """
        mkdir a
        "$IMAGOFS" disk.qcow2 a -o rw
        exec 5<>a/disk.raw
        umount -l a
        no "$IMAGOFS" disk.qcow2 a -o rw 2>error
        grep -q "is in use: imagofs (process" error
        printf late >&5
        exec 5>&-
        ended
        "$IMAGOFS" disk.qcow2 a
        starts_with lateA a/disk.raw
        """,
        tmp_path,
    )


def test_without_the_helper_process(image: Path, tmp_path: Path) -> None:
    """Killed: the mount goes on, and its end loses nothing."""
    succeeds(
        _FUNCTIONS
        + """
        mkdir a
        "$IMAGOFS" disk.qcow2 a -o rw
        kill -KILL $(pgrep -x imagofs-helper)
        write new a/disk.raw
        "$IMAGOFS" umount a
        no pgrep -x imagofs
        "$IMAGOFS" disk.qcow2 a -o rw
        kill -KILL $(pgrep -x imagofs-helper)
        write 2nd a/disk.raw
        kill $(pgrep -x imagofs)
        ended
        "$IMAGOFS" disk.qcow2 a    # over what could not be taken away
        starts_with 2ndA a/disk.raw
        """,
        tmp_path,
    )


def test_several_at_once(image: Path, tmp_path: Path) -> None:
    """Who mounts at one place at the same time: one does, the others are refused."""
    succeeds(
        _FUNCTIONS
        + """
        mkdir a; touch b
        for point in a b; do
            for number in 1 2 3; do
                ("$IMAGOFS" disk.qcow2 $point 2>error.$number && echo $number >>done.$point) &
            done
            wait
            [ "$(wc -l <done.$point)" = 1 ]
            [ "$(cat error.* | grep -c 'is mounted here already')" = 2 ]
            [ "$(findmnt -rno TARGET $point | wc -l)" = 1 ]
            umount $point
        done
        """,
        tmp_path,
    )


def test_closed_standard_streams(image: Path, tmp_path: Path) -> None:
    """The image must not become the daemon's stderr."""
    succeeds(
        _FUNCTIONS
        + """
        mkdir a
        for closed in '<&-' '>&-' '2>&-' '<&- >&- 2>&-'; do
            eval timeout 20 '"$IMAGOFS"' disk.qcow2 a -o rw "$closed"
            starts_with AA a/disk.raw
            eval '"$IMAGOFS"' umount a "$closed"
            eval '"$IMAGOFS"' -f disk.qcow2 a -o rw "$closed" '&'
            until findmnt a >/dev/null; do sleep 0.02; done
            starts_with AA a/disk.raw
            kill -USR1 $!
            kill $!
            wait $!
            eval '"$IMAGOFS"' info disk.qcow2 "$closed" >/dev/null
            qemu-img check -q disk.qcow2
        done
        """,
        tmp_path,
    )


@pytest.mark.parametrize(
    "options",
    [
        "async,auto,atime,defaults,dev,diratime,exec,iversion,mand,_netdev,relatime,strictatime,"
        "lazytime,suid,silent,owner,user,nosymfollow,x-systemd.automount,comment=a",
        "sync,noauto,noatime,nodev,nodiratime,dirsync,noexec,group,noiversion,nomand,nofail,"
        "norelatime,nostrictatime,nolazytime,nosuid,loud,nouser,users,symfollow,X-b.c=d",
    ],
)
def test_generic_options(image: Path, tmp_path: Path, options: str) -> None:
    """What mount(8) calls independent of the file system is accepted."""
    succeeds("mkdir a; mount -t imagofs disk.qcow2 a -o $OPTIONS", tmp_path, OPTIONS=options)
