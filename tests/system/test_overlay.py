"""`-o overlay`: the disk can be written to, and the image stays as it is."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import qemu
from tests.conftest import NewImage
from tests.mount.mounting import MountImage, imagofs, mounting, wait_until


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MountImage]:
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", "temporary")  # the daemon's own current directory is another
    with mounting(tmp_path) as mount_image:
        yield mount_image


def fingerprint(path: Path) -> tuple[str, int]:
    return hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns


@pytest.mark.parametrize("kind", ["qcow2", "raw", "chain"])
def test_a_temporary_one(new_image: NewImage, mount: MountImage, tmp_path: Path, kind: str) -> None:
    fmt = "raw" if kind == "raw" else "qcow2"
    image = new_image("1M", fmt=fmt, writes=["write -P 65 0 8k"])
    if kind == "chain":
        image = new_image(backing=image, writes=["write -P 66 0 4k"])
    image.chmod(0o444)
    before = fingerprint(image)
    for _ in range(2):  # nothing is left of the first time
        mounted = mount(image, "overlay")
        assert mounted.file.name == f"{image.stem}.raw"
        with mounted.file.open("r+b") as file:
            assert file.read(1) == (b"B" if kind == "chain" else b"A")
            file.seek(4096)
            assert file.read(2) == b"AA"
            file.seek(512)
            file.write(b"new")
            os.fsync(file)
        assert mounted.file.read_bytes()[510:517] == (b"BBnewBB" if kind == "chain" else b"AAnewAA")
        assert not list((tmp_path / "temporary").iterdir())
        mounted.umount()
        assert fingerprint(image) == before


def test_one_that_is_kept(new_image: NewImage, mount: MountImage, tmp_path: Path) -> None:
    image = new_image("1M", writes=["write -P 65 0 8k"])
    before = fingerprint(image)
    overlay = tmp_path / "kept.qcow2"
    for number in range(3):
        mounted = mount(image, f"overlay={overlay}")
        with mounted.file.open("r+b") as file:
            assert file.read(number + 1) == b"n" * number + b"A"
            file.seek(number)
            file.write(b"n")
        mounted.umount()
    assert fingerprint(image) == before
    assert qemu.info(overlay)["backing-filename"] == str(image)
    assert qemu.info(overlay)["backing-filename-format"] == "qcow2"
    assert qemu.contents(overlay)[:4] == b"nnnA"
    qemu.check(overlay)


def test_refusals(new_image: NewImage, tmp_path: Path) -> None:
    image, other = new_image("1M"), new_image("1M")
    of_other = new_image(backing=other)
    text = tmp_path / "text"
    text.write_text("no image")
    for overlay, reason in (
        (other, "no backing file"),
        (of_other, "is no overlay of"),
        (text, "qcow2"),
        (tmp_path / "missing/file", "No such file"),
    ):
        before = overlay.read_bytes() if overlay.exists() else None
        done = imagofs(image, tmp_path, "-o", f"overlay={overlay}", ok=1)
        assert reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert (overlay.read_bytes() if overlay.exists() else None) == before
    done = imagofs(image, tmp_path, "-o", "overlay,snapshot=x", ok=2)
    assert "do not go together" in done.stderr


def test_the_gate_still_judges(new_image: NewImage, mount: MountImage, tmp_path: Path) -> None:
    base = new_image("1M")
    image = new_image(backing=base)
    mount(base, "overlay,deny")
    assert "backing file" in imagofs(image, tmp_path, "-o", "overlay,deny", ok=1).stderr
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("order", [1, -1])
def test_a_signal_while_it_is_opened(
    new_image: NewImage, tmp_path: Path, mount: object, order: int
) -> None:
    """Nothing of the overlay is left, and to end when told so is no failure."""
    script = (
        "import sys, trio, imagofs.overlaying\n"
        "from imagofs.cli import main\n"
        "async def never(*words, **named):\n"
        "    await trio.sleep_forever()\n"
        "imagofs.overlaying.open_image = never\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = [new_image("1M"), tmp_path, "-f", "-o", "overlay"]
    command = [sys.executable, "-c", script, *map(str, words)]
    folder = tmp_path / "temporary"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: any(file.stat().st_size for file in folder.iterdir()))
        for number in (signal.SIGUSR1, signal.SIGTERM)[::order]:
            process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, list(folder.iterdir())) == (0, [])
    assert "told to end" in stderr and "Traceback" not in stderr


def test_locks(new_image: NewImage, mount: MountImage) -> None:
    """Others may read the image meanwhile; nobody may write to it."""
    image = new_image("1M")
    mount(image, "overlay")
    mount(image, "overlay")
    qemu.qemu_io(image, "length", read_only=True)
    with pytest.raises(AssertionError, match="lock"):
        qemu.qemu_io(image, "length")


def test_one_with_a_data_file(new_image: NewImage, mount: MountImage, tmp_path: Path) -> None:
    image = new_image("1M", writes=["write -P 65 0 8k"])
    before = fingerprint(image)
    data = tmp_path / "kept.data"
    overlay = qemu.create(tmp_path / "kept.qcow2", backing=image, data_file=str(data))
    mounted = mount(image, f"overlay={overlay}")
    with mounted.file.open("r+b") as file:
        file.write(b"new")
    mounted.umount()
    assert fingerprint(image) == before
    assert b"new" in data.read_bytes()
    assert qemu.contents(overlay)[:4] == b"newA"


def test_one_whose_data_file_is_the_image(
    new_image: NewImage, mount: MountImage, tmp_path: Path
) -> None:
    """What is below the top is never written to, whatever refers to it."""
    image = new_image("1M", writes=["write -P 65 0 8k"])
    before = fingerprint(image)
    data = tmp_path / "kept.data"
    overlay = qemu.create(tmp_path / "kept.qcow2", backing=image, data_file=str(data))
    data.unlink()
    data.hardlink_to(image)
    with pytest.raises(AssertionError, match="is open in the chain already"):
        mount(image, f"overlay={overlay}", "lock=off")
    assert fingerprint(image) == before
