"""The helpers of the tests notice what they are there to notice."""

from __future__ import annotations

from importlib import metadata, resources
from pathlib import Path

import pytest

from tests import qemu
from tests.conftest import NewImage


def test_qemu_io_pattern(new_image: NewImage) -> None:
    image = new_image("1M", writes=["write -P 7 64k 512"])
    qemu.qemu_io(image, "read -P 7 64k 512", "read -P 0 0 64k", read_only=True)
    with pytest.raises(AssertionError):
        qemu.qemu_io(image, "read -P 8 64k 512", read_only=True)
    with pytest.raises(AssertionError):
        qemu.qemu_io(image, "write -P 8 64k 512", read_only=True)


def test_contents_follow_the_chain(new_image: NewImage) -> None:
    base = new_image("128k", writes=["write -P 1 0 128k"], cluster_size=4096)
    top = new_image(backing=base, writes=["write -P 2 512 512"])
    assert qemu.contents(top) == b"\1" * 512 + b"\2" * 512 + b"\1" * (127 << 10)
    assert qemu.info(base)["cluster-size"] == 4096
    assert qemu.info(top)["backing-filename"] == str(base)


def test_check_tells_errors_and_leaks(new_image: NewImage) -> None:
    image = new_image("1M", writes=["write 0 64k"])
    qemu.check(image)
    with image.open("r+b") as file:  # one more cluster counted (a leak), then one fewer (an error)
        refcounts = qemu_refcount_block(image)
        file.seek(refcounts + 2 * 10)
        file.write(b"\0\1")
        file.truncate(11 << 16)
    with pytest.raises(AssertionError):
        qemu.check(image)
    assert qemu.check(image, leaks=True)["leaks"] == 1
    with image.open("r+b") as file:
        file.seek(refcounts)
        file.write(b"\0\0")
    with pytest.raises(AssertionError):
        qemu.check(image, leaks=True)


def qemu_refcount_block(image: Path) -> int:
    """Host offset in bytes of the first refcount block: the first entry of the refcount table."""
    data = image.read_bytes()
    table = int.from_bytes(data[48:56], "big")
    return int.from_bytes(data[table : table + 8], "big")


def test_package_metadata() -> None:
    assert metadata.version("imagofs") == "0.1.0"
    (script,) = metadata.entry_points(group="console_scripts", name="imagofs")
    assert script.value == "imagofs.cli:main"
    assert resources.files("imagofs").joinpath("py.typed").is_file()
