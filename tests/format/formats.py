"""The formats that the conformance suite runs over, each as bytes that are opened in memory.

qemu-img and qemu-io make the qcow2 images and say what a guest reads from them.
"""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagofs import FormatAccess, MemoryStorage, Qcow2, Raw, Storage
from imagofs.format.base import FormatDriver
from imagofs.format.vmdk import open_vmdk
from tests import qemu
from tests.vmdk.build import ZERO_GRAIN, build_sparse, pack_descriptor, pattern

#: Bytes of every disk: no multiple of a cluster, but of a sector.
SIZE = (600 << 10) + 3 * 512

#: Where a raw window begins in its storage.
WINDOWS = {"raw-window": 1536, "raw-window-odd": 1001}

Wrap = Callable[[Storage], Storage]


@dataclass
class Opened:
    """An open image with the memory behind it.

    Attributes:
        access: The image.
        memories: The bytes of its files.
        wrapped: The storages that the image sees, by the same names.
    """

    access: FormatAccess
    memories: dict[str, MemoryStorage] = field(default_factory=dict)
    wrapped: dict[str, Storage] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """What a crash of the program would leave."""
        return {name: memory.to_bytes() for name, memory in self.memories.items()}


@dataclass(frozen=True)
class Disk:
    """A disk in some format.

    Attributes:
        name: How the tests call it.
        files: Its files, the image itself as "image".
        contents: What a guest reads.
        below: What the layers below the top have, None if the format has no layers.
    """

    name: str
    files: dict[str, bytes]
    contents: bytes
    below: bytes | None = None

    @property
    def is_qcow2(self) -> bool:
        return self.name.startswith("qcow2")

    @property
    def writable(self) -> bool:
        """Whether imagofs can write it at all."""
        return self.name not in READ_ONLY

    async def open(
        self,
        *,
        writable: bool = False,
        wrap: Wrap = lambda storage: storage,
        files: dict[str, bytes] | None = None,
    ) -> Opened:
        """Open it, or what became of it."""
        opened = Opened(access=None)  # type: ignore[arg-type]  # made below
        for name, contents in (files or self.files).items():
            is_top = name in ("image", "data") or name.startswith("extent")
            memory = MemoryStorage(contents, writable=writable and is_top)
            opened.memories[name] = memory
            opened.wrapped[name] = wrap(memory)
        driver = await _open_driver(self.name, opened.wrapped, writable)
        opened.access = FormatAccess(driver)
        return opened

    def check(self, files: dict[str, bytes]) -> None:
        """See that qemu-img finds no fault with a qcow2 image, and no leak."""
        if not self.is_qcow2:
            return
        with tempfile.TemporaryDirectory() as folder:
            for name, contents in files.items():
                Path(folder, name).write_bytes(contents)
            # Names in the image are those of the folder that it was made in.
            options: dict[str, Any] = {
                "driver": "qcow2",
                "file": {"driver": "file", "filename": str(Path(folder, "image"))},
                "backing": None,
            }
            if "data" in files:
                data = {"driver": "file", "filename": str(Path(folder, "data"))}
                options["data-file"] = data
            qemu.qemu_img("check", f"json:{json.dumps(options)}")


async def read(access: FormatAccess, guest_offset: int = 0, length: int = SIZE) -> bytes:
    """A part of a disk."""
    got = bytearray(length)
    await access.read(got, guest_offset)
    return bytes(got)


async def reopened(kind: Disk, opened: Opened) -> bytes:
    """What another reader of the files finds."""
    again = await kind.open(files=opened.files())
    async with again.access as access:
        return await read(access, 0, access.size())


@dataclass
class MemoryOpener:
    """Opens the extents and the parent of a VMDK."""

    storages: dict[str, Storage]

    async def open_extent(self, name: str, /, *, writable: bool) -> Storage:
        return self.storages[name]

    async def open_backing(self, name: str, format_name: str | None, /) -> FormatAccess:
        return FormatAccess(await open_vmdk(self.storages[name], opener=self))


async def _open_driver(name: str, storages: dict[str, Storage], writable: bool) -> FormatDriver:
    image = storages["image"]
    if name in WINDOWS:
        return Raw(image, offset=WINDOWS[name], size=SIZE)
    if name == "raw":
        return Raw(image)
    if name.startswith("vmdk"):
        return await open_vmdk(image, opener=MemoryOpener(storages), writable=writable)
    how: dict[str, Any] = {"backing": None}
    if "base" in storages:
        how["backing"] = FormatAccess(Raw(storages["base"]))
    if "middle" in storages:
        middle = await Qcow2.open(storages["middle"], backing=how["backing"])
        how["backing"] = FormatAccess(middle)
    if "data" in storages:
        how["data_file"] = storages["data"]
    return await Qcow2.open(image, writable=writable, **how)


# --- how they are made ----------------------------------------------------------------------------

#: Creation options of the qcow2 images.
QCOW2: dict[str, dict[str, Any]] = {
    "qcow2": {},
    "qcow2-small": {"cluster_size": 512, "refcount_bits": 1},
    "qcow2-large": {"cluster_size": "2M", "refcount_bits": 64},
    "qcow2-v2": {"compat": "0.10"},
    "qcow2-extended": {"extended_l2": True, "cluster_size": "32k"},
    "qcow2-data": {"data_file": "data"},
    "qcow2-data-raw": {"data_file": "data", "data_file_raw": True},
    "qcow2-backing": {"backing": True},
    "qcow2-v2-backing": {"compat": "0.10", "backing": True, "cluster_size": "4k"},
    "qcow2-extended-backing": {"extended_l2": True, "cluster_size": "64k", "backing": True},
    "qcow2-deep": {"backing": True, "middle": True, "cluster_size": "16k"},
    "qcow2-compressed": {},
    "qcow2-zstd": {"compression_type": "zstd"},
}

VMDK = ["vmdk-flat", "vmdk-sparse", "vmdk-stream", "vmdk-delta"]
READ_ONLY = ["vmdk-sparse", "vmdk-stream", "vmdk-delta"]
NAMES = ["raw", *WINDOWS, *QCOW2, *VMDK]
WRITABLE = [name for name in NAMES if name not in READ_ONLY]


@functools.cache
def disk(name: str) -> Disk:
    """The disk called `name`, made when it is first asked for."""
    if name == "raw":
        contents = random.Random(1).randbytes(SIZE)
        return Disk(name, {"image": contents}, contents)
    if name in WINDOWS:
        around = random.Random(2).randbytes(SIZE + 10_000)
        start = WINDOWS[name]
        return Disk(name, {"image": around}, around[start : start + SIZE])
    return _vmdk(name) if name.startswith("vmdk") else _qcow2(name)


def _qcow2(name: str) -> Disk:
    options = dict(QCOW2[name])
    has_middle = options.pop("middle", False)
    has_base = options.pop("backing", False)
    with tempfile.TemporaryDirectory() as folder:
        image, base, middle = (Path(folder, file) for file in ("image", "base", "middle"))
        how: dict[str, Any] = dict(options)
        if has_base:
            # Shorter than the image, and its end is no cluster's.
            base.write_bytes(pattern(7, SIZE - 70_144))
            how |= {"backing": base, "backing_fmt": "raw"}
        if has_middle:
            qemu.create(
                middle,
                SIZE - 512,
                backing=base,
                backing_fmt="raw",
                writes=["write -P 6 300k 40k", "write -z 352k 20k"],
            )
            how |= {"backing": middle, "backing_fmt": "qcow2"}
        if "data_file" in how:
            how["data_file"] = Path(folder, "data")
        compressed = name in ("qcow2-compressed", "qcow2-zstd")
        writes = [
            "write -P 1 1k 3k",
            "write -P 2 130k 130k",
            "write -P 3 600k 1536",
            *(["write -c -P 4 384k 64k", "write -c -P 5 448k 64k"] if compressed else []),
            "write -z 256k 70k",
            "write -z 512k 64k",
        ]
        qemu.create(image, SIZE, writes=writes, **how)
        files = {"image": image.read_bytes()}
        below = bytes(SIZE)
        if has_base:
            files["base"] = base.read_bytes()
            below = files["base"].ljust(SIZE, b"\0")
        if has_middle:
            files["middle"] = middle.read_bytes()
            below = qemu.contents(middle).ljust(SIZE, b"\0")
        if "data_file" in how:
            files["data"] = Path(folder, "data").read_bytes()
        return Disk(name, files, qemu.contents(image), below)


def _vmdk(name: str) -> Disk:
    sectors = SIZE // 512
    if name == "vmdk-flat":
        first, second = pattern(1, 200_192), pattern(2, SIZE - 200_192 - 70 * 512)
        descriptor = pack_descriptor(
            f'RW {len(first) // 512} FLAT "extent1" 3',
            "RW 70 ZERO",
            f'RW {len(second) // 512} FLAT "extent2" 0',
        )
        files = {"image": descriptor, "extent1": bytes(1536) + first, "extent2": second}
        # Zeroes of a ZERO extent stay what they are.
        return Disk(name, files, first + bytes(70 * 512) + second)
    grain = 8 * 512
    grains = {number: pattern(number, grain) for number in range(0, 100, 3)}
    contents = bytearray(SIZE)
    for number, data in grains.items():
        contents[number * grain : (number + 1) * grain] = data
    if name == "vmdk-stream":
        built = build_sparse(grains, sectors, grain_sectors=8, compressed=True)
        return Disk(name, {"image": built}, bytes(contents))
    if name == "vmdk-sparse":
        built = build_sparse(grains, sectors, grain_sectors=8)
        return Disk(name, {"image": built}, bytes(contents))
    parent = build_sparse(
        grains, sectors, grain_sectors=8, descriptor=pack_descriptor(f'RW {sectors} SPARSE "base"')
    )
    below = bytes(contents)
    own = {1: pattern(50, grain), 3: ZERO_GRAIN, 80: pattern(51, grain)}
    for number, data in own.items():
        data = bytes(grain) if data == ZERO_GRAIN else data
        contents[number * grain : (number + 1) * grain] = data
    delta = build_sparse(
        own,
        sectors,
        grain_sectors=8,
        descriptor=pack_descriptor(
            f'RW {sectors} SPARSE "image"', parent="base", parent_cid="12345678", cid="87654321"
        ),
    )
    return Disk(name, {"image": delta, "base": parent}, bytes(contents), below)
