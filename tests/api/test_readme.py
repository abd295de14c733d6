"""The README's Python examples, run as they stand there."""

import ast
import inspect

import pytest

from tests import qemu
from tests.api.readme import python_blocks

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
