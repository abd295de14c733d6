"""The README's examples, run as they stand there."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import qemu
from tests.api.readme import python_blocks, shell_blocks

BLOCKS = python_blocks()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the images that the examples name."""
    monkeypatch.chdir(tmp_path)
    qemu.create(tmp_path / "base.qcow2", "8M", writes=["write -P 1 0 64k"])
    qemu.create(
        tmp_path / "image.qcow2",
        backing="base.qcow2",
        writes=["write -P 2 4k 8k"],
    )
    qemu.create(tmp_path / "new.qcow2", "1G", backing="image.qcow2", writes=["write -P 3 0 64k"])
    return tmp_path


def test_there_are_examples():
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize(("line", "text"), BLOCKS, ids=[f"line-{line}" for line, _ in BLOCKS])
async def test_example(folder, line, text):
    if "create_image(" in text:
        (folder / "new.qcow2").unlink()
    # Line numbers of a failure are the README's.
    code = compile(
        "\n" * (line - 1) + text, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    )
    names: dict[str, object] = {}
    if "SyncFormatAccess" in text:
        # Blocking calls are not for async functions.
        import trio

        await trio.to_thread.run_sync(exec, code, names)
    else:
        # What awaits nothing runs at once and has nothing to wait for.
        result = eval(code, names)
        if inspect.isawaitable(result):
            await result
    if "buf" in names:
        assert names["buf"] == bytes([1]) * 512
    if "buf1" in names:
        assert names["buf1"] == bytes([2]) * 512
        assert names["buf2"] == bytes(100) + bytes([2]) * 512
    if "create_image(" in text:
        qemu.qemu_io(folder / "new.qcow2", "read -P 0x68 1000 1", "read -P 0x6f 1004 1")
        qemu.check(folder / "new.qcow2")


def make_disk(path):
    """A qcow2 over another one, with an ext4 on its only partition and a snapshot inside."""
    flat = path.with_name("flat.raw")
    with flat.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["sfdisk", "-q", flat], input="start=2048, type=83\n", text=True, check=True)
    qemu.run("mkfs.ext4", "-q", "-F", "-E", "offset=1048576", flat, "20m")
    base = path.with_name("base.qcow2")
    qemu.qemu_img("convert", "-O", "qcow2", flat, base)
    qemu.create(path, backing=base.name)
    qemu.qemu_img("snapshot", "-c", "before-update", path)


@pytest.mark.parametrize("heading", ["", "Quick start", "Writing without changing the image"])
def test_shell_examples(tmp_path, heading):
    """What the README shows in a shell works as it stands there, but for where it mounts."""
    make_disk(tmp_path / "disk.qcow2")
    script = "\n".join(shell_blocks(heading))
    assert script.count("imagofs ") > 1
    script = re.sub(r"^\.\.\. ", "touch /mnt/partition/file ", script, flags=re.MULTILINE)
    loop = f"readme-{os.getpid()}"  # a loop device's name is the whole machine's
    script = re.sub(r"((attach|detach) |imagofs-loop/)vm\b", rf"\g<1>{loop}", script)
    for folder in ("/mnt/vm", "/mnt/partition"):
        script = script.replace(folder, str(tmp_path / folder[1:].replace("/", "-")))
    if heading != "Quick start":
        (tmp_path / "mnt-vm").mkdir()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-eux", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    try:
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        if done.returncode:
            for words in (
                ["umount", "-l", "mnt-partition"],
                ["imagofs", "loop", "detach", loop],
                ["umount", "-l", "mnt-vm"],
                ["umount", "-l", "flat.img"],
            ):
                subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True)
