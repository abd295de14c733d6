"""qemu's image locks, with qemu-io on the other side."""

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from imagofs.errors import ClosedError, LockedError, UnsupportedError, errno_of
from imagofs.storage import FileStorage, StorageOpenOptions
from tests import qemu

WRITABLE = StorageOpenOptions(writable=True)


@pytest.fixture
def image(tmp_path):
    return qemu.create(tmp_path / "disk.qcow2", "1M")


@contextmanager
def qemu_io_holds(image, *options):
    """qemu-io, with the image open; its process id."""
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", *options, image],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        assert "1 MiB" in process.stdout.readline()
        yield process.pid
        process.stdin.write("quit\n")


def qemu_refusal(image, *options, fmt="qcow2"):
    """What qemu-io says when it cannot have the image, or "" if it can."""
    done = subprocess.run(
        ["qemu-io", "-f", fmt, *options, "-c", "length", image], capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == ("lock" in output), output
    return output if done.returncode else ""


async def test_qemu_holds_it_for_writing(image):
    with qemu_io_holds(image) as pid:
        async with await FileStorage.open(image, WRITABLE) as storage:
            for writable in (True, False):
                with pytest.raises(LockedError) as caught:
                    storage.lock(writable)
                message = str(caught.value)
                assert message.startswith(f"{image}: is in use: qemu-io (process {pid}) ")
                assert "lock=off" in message
                assert errno_of(caught.value) == 16
    async with await FileStorage.open(image, WRITABLE) as storage:
        storage.lock(True)


async def test_qemu_holds_it_for_reading(image):
    with qemu_io_holds(image, "-r"):
        async with await FileStorage.open(image, WRITABLE) as storage:
            storage.lock(False)
            assert not qemu_refusal(image, "-r")
            with pytest.raises(LockedError, match="qemu-io"):
                storage.lock(True)
            # The refused change left what was held before: reading, against writers.
            assert not qemu_refusal(image, "-r")
        async with await FileStorage.open(image, WRITABLE) as storage:
            with pytest.raises(LockedError):
                storage.lock(True)
            assert not qemu_refusal(image, "-r")
    assert not qemu_refusal(image)


async def test_we_hold_it_for_writing(image):
    async with await FileStorage.open(image, WRITABLE) as storage:
        storage.lock(True)
        for _ in range(2):
            assert "lock" in qemu_refusal(image)
            assert "lock" in qemu_refusal(image, "-r")
            assert not qemu_refusal(image, "-U", "-r")
            storage.lock(True)  # again, which changes nothing
        storage.unlock()
        assert not qemu_refusal(image)
        storage.unlock()
        storage.lock(True)
        assert qemu_refusal(image)
    assert not qemu_refusal(image)


async def test_we_hold_it_for_reading(image):
    for options in (StorageOpenOptions(), WRITABLE, StorageOpenOptions(direct=True)):
        async with await FileStorage.open(image, options) as storage:
            storage.lock(False)
            assert qemu_refusal(image)
            assert not qemu_refusal(image, "-r")
        assert not qemu_refusal(image)


async def test_changing_between_reading_and_writing(image):
    async with await FileStorage.open(image, WRITABLE) as storage:
        storage.lock(False)
        assert not qemu_refusal(image, "-r")
        storage.lock(True)
        assert qemu_refusal(image, "-r")
        storage.lock(False)
        assert not qemu_refusal(image, "-r")
        assert qemu_refusal(image)


async def test_a_raw_image(tmp_path):
    """qemu lets readers of a raw image live with a writer; writers exclude each other."""
    image = qemu.create(tmp_path / "disk.raw", "1M", fmt="raw")
    async with await FileStorage.open(image, WRITABLE) as storage:
        for writable in (True, False):
            storage.lock(writable)
            assert qemu_refusal(image, fmt="raw")
            assert not qemu_refusal(image, "-r", fmt="raw")


async def test_two_storages_of_one_process(image):
    async with (
        await FileStorage.open(image) as first,
        await FileStorage.open(image) as second,
        await FileStorage.open(image, WRITABLE) as third,
    ):
        first.lock(False)
        second.lock(False)
        with pytest.raises(LockedError, match="this process itself"):
            third.lock(True)
        first.unlock()
        second.unlock()
        third.lock(True)
        with pytest.raises(LockedError, match="this process itself"):
            first.lock(False)


async def test_a_lock_of_the_other_kind_names_its_process(image):
    """Not qemu's: an exclusive POSIX lock on the bytes in question."""
    code = (
        "import fcntl, sys\n"
        f"file = open({str(image)!r}, 'r+b')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX, 200, 100)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        async with await FileStorage.open(image) as storage:
            with pytest.raises(LockedError, match=rf"process {process.pid}\b"):
                storage.lock(False)
        process.stdin.close()
    assert not qemu_refusal(image)


async def test_files_of_others_are_not_asked_for_their_status(image, monkeypatch):
    """A file of a FUSE mount that hangs would keep whoever does so."""
    asked = []
    stat = os.stat

    def listening(path):
        asked.append(path)
        return stat(path)

    with qemu_io_holds(image) as pid:
        monkeypatch.setattr(os, "stat", listening)
        async with await FileStorage.open(image, WRITABLE) as storage:
            with pytest.raises(LockedError):
                storage.lock(True)
    assert {path.split("/")[2] for path in asked if path.startswith("/proc/")} == {str(pid)}


async def test_a_file_system_without_such_locks(image, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    async with await FileStorage.open(image) as storage:
        with monkeypatch.context() as patch, pytest.raises(UnsupportedError, match="No locks"):
            patch.setattr(fcntl, "fcntl", refuse)
            storage.lock(False)
        storage.lock(False)


async def test_locks_need_an_open_storage(image):
    storage = await FileStorage.open(image)
    await storage.close()
    storage.unlock()
    with pytest.raises(ClosedError):
        storage.lock(False)


async def test_locks_outlive_other_descriptors_of_the_file(image):
    """POSIX locks would go with the first descriptor of the file that is closed."""
    async with await FileStorage.open(image, WRITABLE) as storage:
        storage.lock(True)
        os.close(os.open(image, os.O_RDWR))
        async with await FileStorage.open(image):
            pass
        assert qemu_refusal(image)
