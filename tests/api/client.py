"""A program that uses the library, as a type checker sees it: `test_names.py` runs mypy on it."""

from __future__ import annotations

import array
import mmap
from pathlib import Path
from typing import assert_type

import imagofs
from imagofs import (
    FormatAccess,
    ImplicitOpenGate,
    ImplicitOpenRequest,
    IndirectMapping,
    IoBuffer,
    IoVector,
    IoVectorMut,
    Mapping,
    PreallocateMode,
    Qcow2,
    Raw,
    RawMapping,
    Storage,
    StorageOpenOptions,
    SyncFormatAccess,
)


class Gate(ImplicitOpenGate):
    """A gate of one's own."""

    def check(self, request: ImplicitOpenRequest) -> None:
        assert_type(request.depth, int)
        assert_type(request.format, str | None)


async def client(path: Path, storage: Storage, memory: mmap.mmap) -> int:
    """Everything that a reader and writer of images does."""
    image = await imagofs.open_image(path, writable=True, gate=Gate(), lock="auto")
    assert_type(image, FormatAccess)
    async with image as same:
        assert_type(same, FormatAccess)
        await image.read(bytearray(1), 0)
        await image.readv([memory, memoryview(memory)[10:], array.array("Q", [1])], 0)
        await image.readv(IoVectorMut([IoBuffer(512, image.memory_alignment)]), 0)
        await image.writev(IoVector([b"a", memory]), 0)
        await image.resize(1 << 20, PreallocateMode.ZERO)
        assert_type(await image.get_mapping(0, 1), Mapping)
        assert_type(await image.ensure_data_mapping(0, 1, overwrite=True), RawMapping)
        assert_type(await image.ensure_zero_mapping(0, 1), tuple[int, int])
        async for guest_offset, mapping in image.map():
            assert_type(guest_offset, int)
            assert_type(mapping, Mapping)
        match await image.get_shallow_mapping(0, 1):
            case IndirectMapping(layer=layer):
                assert_type(layer, FormatAccess)
            case RawMapping(storage=found):
                assert_type(found, Storage)
    backing = FormatAccess(await Raw.open(storage, offset=512, size=512))
    options = StorageOpenOptions(direct=True)
    driver = await Qcow2.open(str(path), backing=backing, storage_options=options)
    assert_type(driver, Qcow2)
    assert_type(driver.header.backing_file, str | None)
    assert_type(backing.dependencies().storages, tuple[Storage, ...])
    await Qcow2.create(path, 1 << 20, cluster_size=4096, backing_file=None)
    await imagofs.create_image(path, "raw", 512, preallocate=PreallocateMode.WRITE_DATA)
    return image.size()


def blocking_client(path: str) -> bytes:
    """The same without an event loop."""
    with SyncFormatAccess.open(path) as image:
        assert_type(image, SyncFormatAccess)
        buffer = bytearray(image.size())
        image.read(buffer, 0)
        assert_type(list(image.map()), list[tuple[int, Mapping]])
        return bytes(buffer)
