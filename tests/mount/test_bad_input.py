"""Bad input: one line that says what is wrong, the exit code, nothing mounted, nothing changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from imagofs.fuse import mounts
from tests import qemu
from tests.conftest import NewImage
from tests.mount.conftest import random_bytes
from tests.mount.mounting import PROGRAM, MountImage, imagofs, mount_at

CLUSTER = 65536


def digest(folder: Path) -> dict[str, str]:
    """The contents of every regular file below `folder`."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def mounts_of(image: Path) -> list[mounts.Mount]:
    """What imagofs has mounted where the image is."""
    below = f"{image.parent}/"
    return [mount for mount in mounts.mounts() if mount.point.startswith(below)]


def refused(
    image: Path, *options: str, point: Path | None = None, code: int = 1, foreground: bool = False
) -> str:
    """Mount what cannot be mounted; return the line that it says why."""
    if point is None:
        point = image.parent / "mnt"
        point.mkdir(exist_ok=True)
    before, mounted = digest(image.parent), mounts_of(image)
    words = ["-o", ",".join(options)] if options else []
    done = imagofs(image, point, *words, *["-f"] * foreground, ok=code)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("imagofs: ") and "Traceback" not in lines[0]
    assert mounts_of(image) == mounted
    assert digest(image.parent) == before
    return lines[0].removeprefix("imagofs: ")


def patch(image: Path, offset: int, data: bytes) -> Path:
    """Overwrite bytes of a file."""
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return image


def set_bit_64(image: Path, offset: int, bit: int) -> Path:
    """Set a bit of a big-endian 64-bit field."""
    with image.open("rb") as file:
        file.seek(offset)
        value = int.from_bytes(file.read(8), "big") | 1 << bit
    return patch(image, offset, value.to_bytes(8, "big"))


# --- images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("foreground", [False, True])
def test_missing_image(tmp_path: Path, foreground: bool) -> None:
    assert "No such file" in refused(tmp_path / "missing.qcow2", foreground=foreground)


@pytest.mark.parametrize("kind", ["directory", "fifo", "socket", "character device"])
def test_not_a_file(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    if kind == "directory":
        image.mkdir()
    elif kind == "fifo":
        os.mkfifo(image)
    elif kind == "character device":
        image.symlink_to("/dev/null")
    else:
        import socket

        # The name may be longer than an address of a socket can be.
        with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(tmp_path):
            listener.bind("image")
    assert str(image) in refused(image)


def test_guessed_raw_is_not_written(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random_bytes(CLUSTER))
    assert "format=raw" in refused(image, "rw")


def test_wrong_format(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random_bytes(CLUSTER))
    assert str(image) in refused(image, "format=qcow2")


@pytest.mark.parametrize("length", [4, 71, 72, 103, 104, 512, CLUSTER, 3 * CLUSTER])
def test_truncated(new_image: NewImage, length: int) -> None:
    image = new_image("1G", writes=["write 0 1M"])
    os.truncate(image, length)
    assert str(image) in refused(image, "rw", "format=qcow2")


@pytest.mark.parametrize(
    "offset, data",
    [
        (4, b"\0\0\0\1"),  # version 1
        (4, b"\0\0\0\4"),  # version 4
        (8, b"\xff" * 8),  # backing name far beyond the end
        (20, b"\0\0\0\x08"),  # clusters of 256 bytes
        (20, b"\0\0\0\x20"),  # clusters of 4 GiB
        (24, b"\xff" * 8),  # size
        (32, b"\0\0\0\1"),  # AES
        (32, b"\0\0\0\2"),  # LUKS
        (32, b"\0\0\0\3"),  # what nobody knows
        (36, b"\xff" * 4),  # L1 entries
        (40, b"\0" * 7 + b"\1"),  # L1 table at an odd place
        (40, b"\x7f" * 8),  # L1 table beyond the end
        (48, b"\x7f" * 8),  # refcount table beyond the end
        (60, b"\xff" * 4),  # snapshots
        (96, b"\0\0\0\7"),  # refcounts of 128 bits
        (100, b"\0\0\0\1"),  # a header of one byte
    ],
)
def test_damaged_header(new_image: NewImage, offset: int, data: bytes) -> None:
    assert "image" in refused(patch(new_image("1G", name="image"), offset, data))


@pytest.mark.parametrize("bit", [5, 17, 63])
def test_unknown_incompatible_bits(new_image: NewImage, bit: int) -> None:
    image = set_bit_64(new_image("64M"), 72, bit)
    assert str(bit) in refused(image)


def test_corrupt_bit(mount: MountImage, new_image: NewImage) -> None:
    image = set_bit_64(new_image("1M", writes=["write -P 3 0 512"]), 72, 1)
    line = refused(image, "rw")
    assert "corrupt" in line and "repair" in line
    assert mount(image).file.read_bytes()[:512] == b"\3" * 512


# --- chains -----------------------------------------------------------------------------------


@pytest.fixture
def chain(new_image: NewImage) -> tuple[Path, Path]:
    """A base and an image on top of it."""
    base = new_image("1M", name="base.qcow2", writes=["write -P 5 0 64k"])
    return base, new_image(name="top.qcow2", backing="base.qcow2")


def test_missing_backing_file(chain: tuple[Path, Path]) -> None:
    base, top = chain
    base.unlink()
    line = refused(top)
    assert str(base) in line and "No such file" in line


def test_refused_backing_file(chain: tuple[Path, Path], mount: MountImage, tmp_path: Path) -> None:
    base, top = chain
    other = tmp_path / "other, folder"
    other.mkdir()
    quoted = str(other).replace(",", "\\,")
    assert "base.qcow2" in refused(top, "deny")
    assert "base.qcow2" in refused(top, f"allow={quoted}")
    assert "missing" in refused(top, f"allow={tmp_path}/missing")
    mounted = mount(top, f"allow={quoted}", f"allow={tmp_path}")
    assert mounted.file.read_bytes()[:CLUSTER] == b"\5" * CLUSTER
    mount(base, "deny")


def test_allowed_directories_count_from_where_the_command_was_given(
    chain: tuple[Path, Path], tmp_path: Path
) -> None:
    _, top = chain
    (tmp_path / "folder").mkdir()
    (tmp_path / "mnt").mkdir()
    words = [str(top), f"{tmp_path}/mnt", "-o"]
    told = imagofs(*words, "allow=.", cwd=tmp_path / "folder", ok=1).stderr
    assert "base.qcow2" in told and f"not below {tmp_path}/folder" in told
    imagofs(*words, "allow=..", cwd=tmp_path / "folder")
    imagofs("umount", f"{tmp_path}/mnt")
    told = imagofs(*words, "allow=folder", cwd=tmp_path, ok=1).stderr
    assert f"not below {tmp_path}/folder" in told


def test_backing_loop(new_image: NewImage) -> None:
    first = new_image("1M", name="first.qcow2")
    second = new_image("1M", name="second.qcow2", backing=first)
    qemu.qemu_img("rebase", "-u", "-b", second, "-F", "qcow2", first)
    assert "loop" in refused(second)
    itself = new_image("1M", name="itself.qcow2")
    qemu.qemu_img("rebase", "-u", "-b", itself, "-F", "qcow2", itself)
    assert "loop" in refused(itself)


def test_deep_chain(new_image: NewImage) -> None:
    base = new_image("1M", name="000.qcow2", cluster_size=4096)
    template = new_image(name="template.qcow2", backing="000.qcow2", cluster_size=4096)
    data = template.read_bytes()
    at = data.index(b"000.qcow2")
    for number in range(1, 202):
        name = f"{number - 1:03}.qcow2".encode()
        base.with_name(f"{number:03}.qcow2").write_bytes(data[:at] + name + data[at + len(name) :])
    line = refused(base.with_name("201.qcow2"))
    assert "200" in line and "deep" in line


# --- mountpoints --------------------------------------------------------------------------------


@pytest.fixture
def good(new_image: NewImage) -> Path:
    """An image that nothing is wrong with."""
    return new_image("1M", name="good.qcow2")


def test_missing_mountpoint(good: Path, tmp_path: Path) -> None:
    assert "directory" in refused(good, point=tmp_path / "missing")
    assert "missing" in refused(good, point=tmp_path / "missing" / "below")


def test_mountpoint_that_is_made(good: Path, tmp_path: Path) -> None:
    for folders, options, mode in (("a", "", 0o755), ("b/c", "=0700", 0o700)):
        point = tmp_path / folders
        imagofs(good, point, "-o", f"X-mount.mkdir{options}")
        imagofs("umount", point)
        assert point.stat().st_mode & 0o777 == mode


def test_mountpoint_of_another_kind(good: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "neither" in refused(good, point=tmp_path / "fifo")
    assert "nowhere" in refused(good, point=_link(tmp_path / "dangling", "nowhere"))


def _link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


def test_busy_mountpoint(
    good: Path, new_image: NewImage, mount: MountImage, tmp_path: Path
) -> None:
    other = new_image("1M", name="other.qcow2")
    mounted = mount(other)
    line = refused(good, point=mounted.path)
    assert str(other) in line and "umount" in line
    assert mounted.file.stat().st_size == 1 << 20


@pytest.mark.parametrize("shared", [False, True])
def test_mountpoint_that_somebody_has_locked(good: Path, tmp_path: Path, shared: bool) -> None:
    """It is waited for, since it may be another who mounts there; but not for ever."""
    point = tmp_path / "mnt"
    point.mkdir()
    lock = ["flock", *["-s"] * shared, str(point)]
    done = subprocess.run([*lock, PROGRAM, good, point], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "locked by another program" in done.stderr
    assert mount_at(point) is not None
    imagofs("umount", point)


def test_image_in_use(good: Path, mount: MountImage, tmp_path: Path) -> None:
    mounted = mount(good, "rw")
    line = refused(good, "rw", point=tmp_path)
    assert "in use" in line and str(mounted.pid) in line
    mounted.umount()


def test_read_only_file_system(good: Path, tmp_path: Path, mount: MountImage) -> None:
    folder = tmp_path / "ro"
    folder.mkdir()
    subprocess.run(["mount", "--bind", tmp_path, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        point = tmp_path / "point"
        point.touch()
        for words in ([], ["-f"]):
            done = imagofs(folder / good.name, point, "-o", "rw", *words, ok=1)
            assert "Read-only file system" in done.stderr and done.stderr.count("\n") == 1
        mount(folder / good.name, at=point).umount()
    finally:
        subprocess.run(["umount", folder], check=True)


def test_no_permission(good: Path, tmp_path: Path) -> None:
    """Without any capability: an image of somebody else, and a mount that nobody may make."""
    point = tmp_path / "point"
    point.touch()
    for owner, named in (1234, good), (0, point):
        os.chown(good, owner, owner)
        good.chmod(0o600)
        command = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]
        command += [str(PROGRAM), str(good), str(point)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith(f"imagofs: {named}: ") and done.stderr.count("\n") == 1
        assert "permi" in done.stderr.lower()
    assert mount_at(point) is None


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, told",
    [
        ("wrong", "'wrong'"),
        ("ro,wrong=1", "'wrong=1'"),
        ("rw=1", "'rw'"),
        ("name", "'name'"),
        ("name=a/b", "'name=a/b'"),
        ("mode=9", "'mode=9'"),
        ("uid=nobody-of-this-name", "no such user"),
        ("format=vdi", "qcow2"),
        ("channel=maybe", "on or off"),
        ("deny,allow=/", "contradict"),
        ("rw,snapshot=x", "snapshot"),
        ("metadata_cache=much", "number"),
    ],
)
def test_wrong_options(good: Path, options: str, told: str) -> None:
    assert told in refused(good, options, code=2)


@pytest.mark.parametrize(
    "words", [[], ["image"], ["image", "point", "more"], ["--wrong"], ["umount"], ["umount", "-x"]]
)
def test_wrong_usage(words: list[str]) -> None:
    done = imagofs(*words, ok=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("imagofs: ")


def test_help_and_version() -> None:
    assert "umount" in imagofs("--help").stdout
    for verb in ("mount", "umount"):
        assert "MOUNTPOINT" in imagofs(verb, "--help").stdout
    assert imagofs("--version").stdout == "imagofs 0.1.0\n"


@pytest.mark.parametrize(
    "words", ["--help", "--version", "info IMAGE", "map --json IMAGE", "check IMAGE", "map IMAGE"]
)
def test_output_that_cannot_be_written(good: Path, words: str) -> None:
    command = [str(PROGRAM), *(word.replace("IMAGE", str(good)) for word in words.split())]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "imagofs: No space left on device\n")


@pytest.mark.parametrize("words", ["info x", "x y", "umount x", "stat x", "create x 1M", "map x"])
def test_a_current_directory_that_is_gone(tmp_path: Path, words: str) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    command = f'cd "$1"; rmdir "$1"; exec "$2" {words}'
    done = subprocess.run(
        ["sh", "-c", command, "sh", folder, PROGRAM], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the current directory" in done.stderr


@pytest.mark.parametrize(
    "words",
    [["", "mnt"], ["good.qcow2", ""], ["umount", ""], ["stat", ""], ["info", ""], ["map", ""],
     ["check", ""], ["create", "", "1M"], ["resize", "", "1M"], ["loop", "attach", "x", ""]],
)  # fmt: skip
def test_empty_names(good: Path, tmp_path: Path, words: list[str]) -> None:
    """They name nothing, not the current directory."""
    (tmp_path / "mnt").mkdir()
    done = imagofs(*words, cwd=tmp_path, ok=1)
    assert done.stderr == "imagofs: a path is empty\n"
    assert mount_at(tmp_path) is None


def test_names_in_another_locale(new_image: NewImage, tmp_path: Path) -> None:
    """A name in an image is bytes, as in a folder, whatever letters they are where it is read."""
    new_image("1M", name="b\u00e4se.qcow2")
    new_image(name="top.qcow2", backing="b\u00e4se.qcow2")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    created = ["create", "-b", "b\u00e4se.qcow2", "-F", "qcow2", "made.qcow2"]
    for words in (["map", "top.qcow2"], created, ["map", "made.qcow2"], ["check", "made.qcow2"]):
        done = subprocess.run(
            [PROGRAM, *words], cwd=tmp_path, env={**os.environ, **locale}, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    assert qemu.info(tmp_path / "made.qcow2")["backing-filename"] == "b\u00e4se.qcow2"


def test_file_with_the_name_of_a_verb(good: Path, tmp_path: Path) -> None:
    point = tmp_path / "mnt"
    point.mkdir()
    good.rename(tmp_path / "umount")
    imagofs("./umount", "mnt", cwd=tmp_path)
    assert mount_at(point) is not None
    imagofs("umount", "mnt", cwd=tmp_path)
    imagofs("mount", "umount", "mnt", cwd=tmp_path)
    imagofs("umount", "mnt", cwd=tmp_path)


# --- what is met later --------------------------------------------------------------------------


def test_bad_table_entry(mount: MountImage, new_image: NewImage, tmp_path: Path) -> None:
    """An entry that points nowhere gives EIO where it is, and nowhere else."""
    image = new_image("1G", writes=["write -P 1 0 64k", "write -P 2 512M 64k"])
    table = int.from_bytes(image.read_bytes()[40:48], "big")
    patch(image, table + 8, (1 << 63 | 512).to_bytes(8, "big"))  # the second L2 table, misaligned
    mounted = mount(image)
    with mounted.file.open("rb", buffering=0) as file:
        for _ in range(3):
            with pytest.raises(OSError):
                os.pread(file.fileno(), 4096, 512 << 20)
            assert os.pread(file.fileno(), 4096, 0) == b"\1" * 4096
    assert mounted.is_running()
