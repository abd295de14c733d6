"""O_DIRECT: alignments, files that end in the middle of a block, the page cache beside it."""

import ctypes
import mmap
import os
import random

import pytest

from imagofs.errors import OutOfRangeError
from imagofs.storage import FileStorage, StorageOpenOptions
from imagofs.storage.bounce import aligned_buffer
from imagofs.storage.syscalls import _stated_alignments, _tried_alignments, direct_alignments
from imagofs.vectors import is_address_aligned
from tests.storage.drivers import loop_device

DIRECT = StorageOpenOptions(writable=True, direct=True)


@pytest.fixture
def direct_fd(tmp_path):
    """A descriptor with O_DIRECT of a file of 64 KiB."""
    (tmp_path / "file").write_bytes(bytes(65536))
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_DIRECT)
    yield fd
    os.close(fd)


def test_probed_alignments_are_enough(direct_fd):
    for memory, request in (direct_alignments(direct_fd), _tried_alignments(direct_fd)):
        buffer = aligned_buffer(2 * memory + request, memory)[memory:][:request]
        assert os.preadv(direct_fd, [buffer], request) == request
        assert os.pwritev(direct_fd, [buffer], request) == request


def test_what_the_system_states_and_what_is_found_by_trying_agree(direct_fd):
    stated = _stated_alignments(direct_fd)
    if stated is None:
        pytest.skip("this kernel or file system does not state its alignments")
    memory, request = _tried_alignments(direct_fd)
    assert request <= stated[1]
    assert memory <= stated[0]


def test_short_files_tell_nothing_by_trying(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    fd = os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT)
    assert _tried_alignments(fd) == (4096, 4096)
    os.close(fd)


@pytest.mark.parametrize("alignment", [1, 512, 4096, 16384, 1 << 20])
def test_aligned_buffers(alignment):
    for length in (1, 4096, 100_000):
        buffer = aligned_buffer(length, alignment)
        assert buffer.nbytes == length
        assert is_address_aligned(buffer, alignment)
        buffer[:] = b"x" * length


def _is_cached(path, length):
    """Whether any of the first `length` bytes of a file is in the page cache: mincore(2).

    A read with RWF_NOWAIT cannot tell: it starts to read ahead, and may find what that brought.
    """
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY) as pages,
    ):
        start = ctypes.c_char.from_buffer(pages)
        resident = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        address = ctypes.c_void_p(ctypes.addressof(start))
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(length), resident) == 0
        del start
    return any(byte & 1 for byte in resident.raw)


async def test_direct_requests_leave_nothing_in_the_page_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(1 << 20))
    async with await FileStorage.open(path, DIRECT) as storage:
        await storage.sync()
        await storage.invalidate_cache()
        buffer = aligned_buffer(65536, 4096)
        await storage.readv([buffer], 65536)
        assert not _is_cached(path, 1 << 20)
        assert buffer == path.read_bytes()[65536:131072]
        assert _is_cached(path, 1 << 20)
        await storage.invalidate_cache()
        await storage.writev([buffer], 0)
        assert not _is_cached(path, 1 << 20)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4095, 4097, 100_001])
async def test_the_end_of_a_file_stays_where_it_is(tmp_path, size):
    path = tmp_path / "file"
    model = bytearray(random.Random(size).randbytes(size))
    path.write_bytes(model)
    rng = random.Random(size)
    async with await FileStorage.open(path, DIRECT) as storage:
        for _ in range(30):
            length = rng.choice([1, 100, 512, 4096, 5000])
            offset = max(0, len(model) - rng.randrange(6000))
            data = rng.randbytes(length)
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = data
            await storage.writev([memoryview(data)], offset)
            assert storage.size() == path.stat().st_size == len(model)
            assert path.read_bytes() == model  # through the page cache
            buffer = bytearray(len(model) + 700)
            await storage.readv([memoryview(buffer)], 0)
            assert buffer == model + bytes(700)
            if rng.random() < 0.3:
                await storage.sync()


async def test_direct_on_a_device_with_large_blocks(tmp_path):
    (tmp_path / "backing").write_bytes(bytes(1 << 20))
    with loop_device(tmp_path / "backing", "-b", "4096") as device:
        async with await FileStorage.open(device, DIRECT) as storage:
            assert storage.request_alignment == 4096
            assert storage.zero_alignment == storage.discard_alignment == 4096
            await storage.writev([memoryview(b"x" * 10_000)], 1000)
            await storage.write_zeroes(3000, 6000)
            buffer = bytearray(12_000)
            await storage.readv([memoryview(buffer)], 0)
            assert buffer == bytes(1000) + b"x" * 2000 + bytes(6000) + b"x" * 2000 + bytes(1000)
            with pytest.raises(OutOfRangeError):
                await storage.readv([memoryview(buffer)], -512)
