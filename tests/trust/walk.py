"""Random walks over qcow2 images of random shapes, against a `bytearray` that says what is right.

qemu-img and qemu-io make the image, its chain and its snapshots, and judge what imagofs made of it:
no errors, no leaks, the disk as the model says, snapshots as they were.

    python -m tests.trust.walk --runs 1000 --seed 1
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from imagofs.access import FormatAccess
from imagofs.errors import UnsupportedError
from imagofs.gate import PermissiveImplicitOpenGate
from imagofs.mapping import RawMapping
from imagofs.opening import open_image
from imagofs.storage.base import StorageOpenOptions
from tests import qemu
from tests.support.qcow2_oracle import check

K, M = 1 << 10, 1 << 20
SECTOR = 512


@dataclass(slots=True)
class Shape:
    """What an image is made like; `str` of it goes into reports."""

    size: int
    cluster: int
    options: dict[str, Any]
    data_file: bool = False
    backing: list[tuple[str, int]] = field(default_factory=list)  # format and size, bottom first
    snapshots: int = 0
    compressed: bool = False
    bitmap: bool = False
    metadata_bytes: int | None = None
    direct: bool = False


def random_shape(rnd: random.Random) -> Shape:
    """Any shape that qemu-img can make."""
    cluster = rnd.choice([512, 512, 512, 1024, 2048, 4096, 16 * K, 64 * K, 64 * K, 2 * M])
    largest = {512: M, 1024: 2 * M, 2048: 3 * M, 4096: 4 * M}.get(cluster, 6 * M)
    size = rnd.randrange(1, largest // SECTOR) * SECTOR
    if rnd.random() < 0.3:
        size = -(-size // (64 * K)) * 64 * K
    shape = Shape(size, cluster, {"cluster_size": cluster})
    if rnd.random() < 0.15:
        shape.options["compat"] = "0.10"
    else:
        shape.options["refcount_bits"] = rnd.choice([1, 2, 4, 8, 16, 16, 32, 64])
        if cluster >= 16 * K and rnd.random() < 0.5:
            shape.options["extended_l2"] = True
        if rnd.random() < 0.2:
            shape.data_file = True
            shape.options["data_file_raw"] = rnd.random() < 0.5
        shape.bitmap = rnd.random() < 0.1
        shape.options["lazy_refcounts"] = rnd.random() < 0.1
        if rnd.random() < 0.3:
            shape.options["compression_type"] = "zstd"
    if not shape.options.get("data_file_raw") and rnd.random() < 0.5:
        for number in range(rnd.randrange(1, 4)):
            fmt = rnd.choice(
                ["raw", "qcow2", "vmdk"] if number == 0 else ["qcow2", "qcow2", "vmdk"]
            )
            if fmt == "vmdk" and number and shape.backing[-1][0] != "vmdk":
                fmt = "qcow2"  # a VMDK's parent is a VMDK
            below = rnd.randrange(1, largest // SECTOR) * SECTOR
            shape.backing.append((fmt, size if rnd.random() < 0.3 else below))
    if not shape.backing and rnd.random() < 0.15:
        shape.options["preallocation"] = rnd.choice(["metadata", "falloc", "full"])
    elif not shape.data_file:
        shape.compressed = rnd.random() < 0.4
        # Small compressed clusters share host clusters, and a snapshot doubles their references.
        too_few = (1, 2, 4, 8) if shape.compressed else (1, 2)
        if shape.options.get("refcount_bits") not in too_few and rnd.random() < 0.4:
            shape.snapshots = rnd.randrange(1, 3)
    if rnd.random() < 0.6:
        shape.metadata_bytes = 1  # as small as can be
    shape.direct = rnd.random() < 0.1
    return shape


def random_writes(rnd: random.Random, size: int, cluster: int, compressed: bool) -> list[str]:
    """qemu-io commands. Compressed clusters come first: they must not be allocated yet."""
    commands: list[str] = []
    taken: set[int] = set()
    for _ in range(rnd.randrange(1, 7)):
        start = rnd.randrange(size // SECTOR) * SECTOR
        length = min(size - start, rnd.randrange(1, 200 * K // SECTOR) * SECTOR)
        pattern = rnd.randrange(1, 255)
        if compressed and rnd.random() < 0.6:
            start = start // cluster * cluster
            for position in range(start, min(start + 4 * cluster, size - cluster), cluster):
                if position not in taken:
                    taken.add(position)
                    commands.insert(0, f"write -q -c -P {pattern} {position} {cluster}")
        elif rnd.random() < 0.15:
            commands.append(f"write -q -z {start} {length}")
        else:
            commands.append(f"write -q -P {pattern} {start} {length}")
    return commands


class Walk:
    """One image, its model, and what is done to both.

    Args:
        seed: Says everything.
        folder: For files; empty.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.rnd = random.Random(seed)
        self.folder = folder
        self.shape = random_shape(self.rnd)
        self.path = folder / "image.qcow2"
        self.done: list[str] = []
        self.below = b""
        self.snapshots: list[bytes] = []
        self._make()
        self.model = bytearray(qemu.contents(self.path))

    # --- before and after -------------------------------------------------------------------------

    def _make(self) -> None:
        shape, rnd = self.shape, self.rnd
        lower: Path | None = None
        for number, (fmt, size) in enumerate(shape.backing):
            path = self.folder / f"layer{number}.{fmt}"
            if fmt == "raw":
                path.write_bytes(rnd.randbytes(size // 2).ljust(size, b"\0"))
            else:
                lower_fmt = shape.backing[number - 1][0]
                # A VMDK has its parent's size.
                own_size = None if fmt == "vmdk" and lower else size
                qemu.create(path, own_size, fmt=fmt, backing=lower, backing_fmt=lower_fmt)
                size = qemu.info(path)["virtual-size"]
                shape.backing[number] = fmt, size
                qemu.qemu_io(path, *random_writes(rnd, size, 64 * K, False), fmt=fmt)
            lower = path
        options = dict(shape.options)
        if shape.data_file:
            options["data_file"] = str(self.folder / "data")
        backing_fmt = shape.backing[-1][0] if shape.backing else None
        qemu.create(self.path, shape.size, backing=lower, backing_fmt=backing_fmt, **options)
        if lower is not None:
            self.below = qemu.contents(lower, fmt=backing_fmt or "raw")
        if shape.bitmap:
            qemu.qemu_img("bitmap", "--add", self.path, "b")
        for number in range(shape.snapshots + 1):
            if rnd.random() < 0.9:
                compressed = shape.compressed and number == 0
                writes = random_writes(rnd, shape.size, shape.cluster, compressed)
                qemu.qemu_io(self.path, *writes)
            if number < shape.snapshots:
                qemu.qemu_img("snapshot", "-c", f"s{number}", self.path)
        self.snapshots = [self._snapshot(number) for number in range(shape.snapshots)]

    def _snapshot(self, number: int) -> bytes:
        flat = self.folder / "snapshot"
        qemu.qemu_img("convert", "-l", f"snapshot.name=s{number}", "-O", "raw", self.path, flat)
        return flat.read_bytes()

    def judge(self) -> None:
        """What qemu and the oracle say, once it is closed."""
        qemu.check(self.path)
        image = self.path.read_bytes()
        if not self.shape.bitmap:  # the oracle does not know those
            verdict = check(image)
            assert not verdict.errors and not verdict.leaked, verdict
        self._compare(qemu.contents(self.path), "qemu reads")
        for number, before in enumerate(self.snapshots):
            # qemu-img shows it in the size that the disk has by now.
            assert self._snapshot(number)[: len(before)] == before, f"snapshot {number} changed"
        if self.shape.options.get("data_file_raw"):
            data = (self.folder / "data").read_bytes()
            self._compare(data[: len(self.model)], "the raw data file has")

    def _compare(self, found: bytes | bytearray, what: str, start: int = 0) -> None:
        expected = self.model[start : start + len(found)]
        if found == expected:
            return
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), -1)
        if at < 0:
            raise AssertionError(f"{what} {len(found)} bytes, not {len(expected)}")
        raise AssertionError(
            f"{what} {found[at : at + 4].hex()} at {start + at:#x}, not "
            f"{expected[at : at + 4].hex()}"
        )

    async def _open(self) -> FormatAccess:
        return await open_image(
            self.path,
            writable=True,
            gate=PermissiveImplicitOpenGate(),
            metadata_bytes=self.shape.metadata_bytes,
            storage_options=StorageOpenOptions(direct=self.shape.direct),
        )

    # --- the walk ---------------------------------------------------------------------------------

    async def walk(self, steps: int) -> None:
        """Do random things, then close the image."""
        image = await self._open()
        try:
            for _ in range(steps):
                if self.rnd.random() < 0.02:
                    self.done.append("reopen")
                    await image.close()
                    image = await self._open()
                else:
                    await self._step(image)
            found = bytearray(image.size())
            await image.read(found, 0)
            self._compare(found, "imagofs reads")
        finally:
            await image.close()

    async def _step(self, image: FormatAccess) -> None:
        rnd = self.rnd
        size = len(self.model)
        start = rnd.randrange(size)
        if rnd.random() < 0.5:
            start = start // self.shape.cluster * self.shape.cluster
        length = rnd.choice(
            [
                1,
                512,
                4096,
                self.shape.cluster,
                rnd.randrange(1, 3000),
                rnd.randrange(1, 300 * K),
                rnd.randrange(1, 4 * self.shape.cluster),
            ]
        )
        length = min(length, size - start)
        if rnd.random() < 0.05:
            length = size - start
        step = rnd.choices(
            [
                self.read,
                self.write,
                self.zero,
                self.allocate,
                self.discard_to_zero,
                self.discard_to_any,
                self.discard_to_backing,
                self.map_and_write,
                self.flush,
                self.sync,
                self.resize,
            ],
            [25, 40, 6, 4, 6, 4, 5, 3, 3, 3, 4],
        )[0]
        self.done.append(f"{step.__name__} {start:#x} {length:#x}")
        await step(image, start, length)

    async def read(self, image: FormatAccess, start: int, length: int) -> None:
        """Read into one buffer, or two."""
        cut = self.rnd.randrange(length)
        buffers = [bytearray(cut), bytearray(length - cut)]
        await image.readv(buffers, start)
        self._compare(b"".join(buffers), "imagofs reads", start)

    async def write(self, image: FormatAccess, start: int, length: int) -> None:
        """Write from one buffer, or two."""
        data = self.rnd.randbytes(length)
        cut = self.rnd.choice([0, self.rnd.randrange(length)])
        await image.writev([data[:cut], data[cut:]] if cut else [data], start)
        self.model[start : start + length] = data

    async def zero(self, image: FormatAccess, start: int, length: int) -> None:
        """Write zeroes."""
        await image.write_zeroes(start, length)
        self.model[start : start + length] = bytes(length)

    async def allocate(self, image: FormatAccess, start: int, length: int) -> None:
        """Write zeroes that take space."""
        await image.write_zeroes(start, length, allocate=True)
        self.model[start : start + length] = bytes(length)

    async def discard_to_zero(self, image: FormatAccess, start: int, length: int) -> None:
        """Discard."""
        await image.discard_to_zero(start, length)
        self.model[start : start + length] = bytes(length)

    async def discard_to_any(self, image: FormatAccess, start: int, length: int) -> None:
        """Discard; each byte is as before or zero afterwards."""
        await image.discard_to_any(start, length)
        found = bytearray(length)
        await image.read(found, start)
        position = 0
        while position < length:
            following = min(length, (start + position) // SECTOR * SECTOR + SECTOR - start)
            part = found[position:following]
            if any(part):
                self._compare(part, "discarded to anything, imagofs reads", start + position)
            position = following
        self.model[start : start + length] = found

    async def discard_to_backing(self, image: FormatAccess, start: int, length: int) -> None:
        """Whole clusters show the layer below."""
        await image.discard_to_backing(start, length)
        cluster, end = self.shape.cluster, start + length
        if end != len(self.model):
            end = end // cluster * cluster
        start = -(-start // cluster) * cluster
        if start < end:
            self.model[start:end] = self.below[start:end].ljust(end - start, b"\0")

    async def map_and_write(self, image: FormatAccess, start: int, length: int) -> None:
        """Write through a mapping."""
        overwrite = self.rnd.random() < 0.5
        mapping = await image.ensure_data_mapping(start, length, overwrite=overwrite)
        assert isinstance(mapping, RawMapping)
        assert mapping.writable
        assert 0 < mapping.length <= length
        length = mapping.length
        if not overwrite:
            await self.read(image, start, length)
            length = self.rnd.randrange(1, length + 1)
        data = self.rnd.randbytes(length)
        await mapping.storage.writev([memoryview(data)], mapping.offset)
        self.model[start : start + length] = data

    async def flush(self, image: FormatAccess, start: int, length: int) -> None:
        """Flush."""
        await image.flush()

    async def sync(self, image: FormatAccess, start: int, length: int) -> None:
        """Sync."""
        await image.sync()

    async def resize(self, image: FormatAccess, start: int, length: int) -> None:
        """Another size; some images refuse it."""
        old = len(self.model)
        size = self.rnd.choice([old // 2, old + length, old + 100 * K, start])
        size = min(max(size // SECTOR, 1) * SECTOR, 8 * M)
        self.done[-1] = f"resize {size:#x}"
        try:
            await image.resize(size)
        except UnsupportedError:
            self.done[-1] += " refused"
            assert image.size() == old
            return
        assert image.size() == size
        self.model = self.model[:size].ljust(size, b"\0")


def run(seed: int, folder: Path, steps: int = 60) -> None:
    """One walk.

    Raises:
        AssertionError: Something is not as it must be; the message has the seed and the last steps.
    """
    walk = Walk(seed, folder)
    try:
        trio.run(walk.walk, steps)
        walk.judge()
    except Exception as error:
        steps_done = "\n  ".join(walk.done[-12:])
        raise AssertionError(
            f"seed {seed}, {walk.shape}: {type(error).__name__}: {error}\n  {steps_done}"
        ) from error


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Walk at random over qcow2 images.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    began, failed = time.perf_counter(), 0
    for seed in range(arguments.seed, arguments.seed + arguments.runs):
        with tempfile.TemporaryDirectory(prefix="imagofs-walk-") as name:
            try:
                run(seed, Path(name), arguments.steps)
            except AssertionError as error:
                failed += 1
                print(error, flush=True)
                if os.environ.get("IMAGOFS_WALK_RAISE"):
                    raise
    print(f"{arguments.runs} walks, {failed} failed, {time.perf_counter() - began:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
