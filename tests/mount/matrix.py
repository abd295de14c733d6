"""Images of every kind that the data path knows, made by qemu's tools: name to builder."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import qemu

__all__ = ["MATRIX", "Builder"]

Builder = Callable[[Path], tuple[Path, str]]

MIB = 1 << 20
KIB = 1 << 10


def _writes(size: int, seed: int, count: int = 24) -> list[str]:
    """qemu-io commands that fill some of the disk: patterns, zeroes, discards."""
    rnd = random.Random(seed)
    commands = []
    for number in range(count):
        length = min(size, rnd.choice([512, 4 * KIB, 64 * KIB, 200 * KIB])) // 512 * 512
        offset = rnd.randrange(0, size - length + 1) // 512 * 512
        kind = rnd.random()
        if kind < 0.7:
            commands.append(f"write -P {rnd.randrange(1, 256)} {offset} {length}")
        elif kind < 0.85:
            commands.append(f"write -z {'-u ' if number % 2 else ''}{offset} {length}")
        else:
            commands.append(f"discard {offset} {length}")
    return commands


def _plain(size: int = 6 * MIB, **options: Any) -> Builder:
    def build(folder: Path) -> tuple[Path, str]:
        seed = size + len(str(options))
        image = qemu.create(
            folder / "image.qcow2", size, writes=_writes(size // 512 * 512, seed), **options
        )
        return image, "qcow2"

    return build


def _data_file(**options: Any) -> Builder:
    def build(folder: Path) -> tuple[Path, str]:
        image = qemu.create(
            folder / "image.qcow2",
            6 * MIB,
            writes=_writes(6 * MIB, 5),
            data_file=str(folder / "image.data"),
            **options,
        )
        return image, "qcow2"

    return build


def _compressed(kind: str, **options: Any) -> Builder:
    """Compressed clusters, some of them overwritten, and some that did not get smaller."""

    def build(folder: Path) -> tuple[Path, str]:
        rnd = random.Random(3)
        words = [rnd.randbytes(rnd.randrange(2, 9)) for _ in range(400)]
        source = folder / "source.raw"
        text = b" ".join(rnd.choices(words, k=500_000))[: 3 * MIB]
        source.write_bytes(text + rnd.randbytes(MIB) + bytes(MIB) + text[: MIB + 512])
        image = folder / "image.qcow2"
        settings = {"compression_type": kind, **options}
        listed = ",".join(f"{k}={v}" for k, v in settings.items())
        qemu.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", listed, source, image)
        source.unlink()
        qemu.qemu_io(image, "write -P 1 100k 4k", "write -z 300k 128k", "write -P 2 2M 70k")
        return image, "qcow2"

    return build


def _chain(
    sizes: list[int],
    *,
    base_format: str = "qcow2",
    absolute: bool = False,
    layers: list[dict[str, Any]] | None = None,
) -> Builder:
    """A chain, the base first; each layer has its own data, named relatively or absolutely."""

    def build(folder: Path) -> tuple[Path, str]:
        folder = folder / "below"
        folder.mkdir()
        below: Path | None = None
        below_format = base_format
        for number, size in enumerate(sizes):
            fmt = base_format if number == 0 else "qcow2"
            path = folder / f"layer{number}.{fmt}"
            options = (layers or [{}] * len(sizes))[number]
            if fmt == "raw":
                # A base whose size is a multiple of nothing.
                path.write_bytes(random.Random(number).randbytes(size))
            else:
                named = None if below is None else str(below if absolute else below.name)
                qemu.create(
                    path,
                    size,
                    backing=named,
                    backing_fmt=None if named is None else below_format,
                    writes=_writes(size // 512 * 512, number, 12),
                    **options,
                )
            below, below_format = path, fmt
        assert below is not None
        return below, "qcow2"

    return build


def _no_backing_format(build_chain: Builder) -> Builder:
    """The same chain without the extension that names the backing file's format."""

    def build(folder: Path) -> tuple[Path, str]:
        image, fmt = build_chain(folder)
        data = bytearray(image.read_bytes())
        at = data.index((0xE2792ACA).to_bytes(4, "big"))
        data[at : at + 4] = (0x12345678).to_bytes(4, "big")  # an unknown extension now
        image.write_bytes(data)
        return image, fmt

    return build


def _snapshots(build_image: Builder) -> Builder:
    def build(folder: Path) -> tuple[Path, str]:
        image, fmt = build_image(folder)
        for number in range(3):
            qemu.qemu_img("snapshot", "-c", f"snap{number}", image)
            qemu.qemu_io(image, *_writes(4 * MIB, 100 + number, 6))
        qemu.qemu_img("snapshot", "-d", "snap1", image)
        return image, fmt

    return build


def _raw(size: int) -> Builder:
    def build(folder: Path) -> tuple[Path, str]:
        path = folder / "image.img"
        with path.open("wb") as file:
            file.truncate(size)
            file.seek(size // 3)
            file.write(random.Random(size).randbytes(size // 4))
        return path, "raw"

    return build


def _bits(image_of: Builder, offset: int, bit: int) -> Builder:
    """An image with a bit set in a 64-bit field of the header."""

    def build(folder: Path) -> tuple[Path, str]:
        image, fmt = image_of(folder)
        data = bytearray(image.read_bytes())
        field = int.from_bytes(data[offset : offset + 8], "big") | 1 << bit
        data[offset : offset + 8] = field.to_bytes(8, "big")
        image.write_bytes(data)
        return image, fmt

    return build


MATRIX: dict[str, Builder] = {
    **{f"cluster {1 << bits}": _plain(cluster_size=1 << bits) for bits in range(9, 22)},
    **{
        f"refcount {1 << order} bits": _plain(cluster_size=4096, refcount_bits=1 << order)
        for order in range(7)
    },
    **{f"size {size}": _plain(size) for size in (0, 512, 65536, 65537, MIB - 512, 5 * MIB + 1536)},
    "version 2": _plain(compat="0.10"),
    "version 2, small clusters": _plain(compat="0.10", cluster_size=512),
    "lazy refcounts": _plain(lazy_refcounts=True),
    "extended L2": _plain(extended_l2=True),
    "extended L2, 16k": _plain(extended_l2=True, cluster_size="16k"),
    "extended L2, 128k": _plain(extended_l2=True, cluster_size="128k"),
    "extended L2, 2M": _plain(extended_l2=True, cluster_size="2M"),
    "metadata preallocated": _plain(preallocation="metadata"),
    "fully preallocated": _plain(preallocation="falloc"),
    "extended L2, preallocated": _plain(extended_l2=True, preallocation="metadata"),
    "data file": _data_file(),
    "data file, raw": _data_file(data_file_raw=True),
    "data file, extended L2": _data_file(extended_l2=True),
    "data file, small clusters": _data_file(cluster_size=4096),
    "zlib": _compressed("zlib"),
    "zstd": _compressed("zstd"),
    "zlib, 4k clusters": _compressed("zlib", cluster_size=4096),
    "zstd, 2M clusters": _compressed("zstd", cluster_size="2M"),
    "zlib, extended L2": _compressed("zlib", extended_l2="on"),
    "zstd, extended L2, 16k": _compressed("zstd", extended_l2="on", cluster_size="16k"),
    "zlib, 512-byte clusters": _compressed("zlib", cluster_size=512),
    "on qcow2": _chain([6 * MIB, 6 * MIB]),
    "on qcow2, absolute name": _chain([6 * MIB, 6 * MIB], absolute=True),
    "on a shorter qcow2": _chain([2 * MIB + 512, 6 * MIB]),
    "on a longer qcow2": _chain([6 * MIB, 2 * MIB + 512]),
    "on raw": _chain([6 * MIB, 6 * MIB], base_format="raw"),
    "on a shorter raw": _chain([3 * MIB + 512 * 3, 6 * MIB], base_format="raw"),
    "on a raw of odd size": _chain([MIB + 12345, 6 * MIB], base_format="raw"),
    "on a longer raw": _chain([6 * MIB + 777, 4 * MIB], base_format="raw"),
    "chain of 5": _chain([4 * MIB, 6 * MIB, 3 * MIB, 5 * MIB, 6 * MIB]),
    "chain of mixed clusters": _chain(
        [6 * MIB] * 4,
        layers=[
            {"cluster_size": 512},
            {"cluster_size": "2M"},
            {"cluster_size": 4096},
            {"cluster_size": "64k"},
        ],
    ),
    "extended L2 on raw": _chain(
        [5 * MIB + 99, 6 * MIB], base_format="raw", layers=[{}, {"extended_l2": True}]
    ),
    "extended L2 on extended L2": _chain(
        [6 * MIB] * 3, layers=[{"extended_l2": True, "cluster_size": "16k"}] * 3
    ),
    "version 2 on raw": _chain(
        [4 * MIB + 5, 6 * MIB], base_format="raw", layers=[{}, {"compat": "0.10"}]
    ),
    "format of the backing file missing": _no_backing_format(_chain([6 * MIB, 6 * MIB])),
    "format of a raw backing file missing": _no_backing_format(
        _chain([3 * MIB + 512, 6 * MIB], base_format="raw")
    ),
    "snapshots": _snapshots(_plain()),
    "snapshots, small clusters": _snapshots(_plain(cluster_size=1024)),
    "snapshots, extended L2": _snapshots(_plain(extended_l2=True)),
    "snapshots on compressed": _snapshots(_compressed("zlib")),
    "unknown compatible bit": _bits(_plain(), 80, 17),
    "unknown autoclear bit": _bits(_plain(), 88, 40),
    "dirty bit": _bits(_plain(lazy_refcounts=True), 72, 0),
    "corrupt bit": _bits(_plain(), 72, 1),
    "raw": _raw(5 * MIB),
    "raw of odd size": _raw(3 * MIB + 333),
}
