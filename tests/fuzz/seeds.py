"""Valid images of many kinds, small, as files by name: what the mutations begin with.

Names within them are relative, so that they can be put into any folder.
"""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Any

from tests import qemu
from tests.vmdk.build import ZERO_GRAIN, build_sparse, pack_descriptor, pattern

__all__ = ["KINDS", "seed"]

_GRAIN_SECTORS = 8
_VMDK_SECTORS = 300
_GRAINS = {n: pattern(n, 4096) for n in (0, 2, 3, 17, 36)} | {5: ZERO_GRAIN}

# Size in KiB and creation options; "then" names what is done with the image afterwards.
_QCOW2: dict[str, dict[str, Any]] = {
    "qcow2": {"size": 512, "cluster_size": 4096, "then": "compress"},
    "qcow2-snapshots": {"size": 300, "cluster_size": 4096, "then": "snapshots"},
    "qcow2-bitmaps": {"size": 512, "cluster_size": 4096, "then": "bitmaps"},
    "qcow2-v2": {"size": 200, "cluster_size": 1024, "compat": "0.10", "then": "snapshots"},
    "qcow2-small": {"size": 200, "cluster_size": 512, "refcount_bits": 1, "then": "compress"},
    "qcow2-extended": {"size": 900, "cluster_size": 16384, "extended_l2": True},
    "qcow2-zstd": {
        "size": 512,
        "cluster_size": 8192,
        "compression_type": "zstd",
        "then": "compress",
    },
    "qcow2-usual": {"size": 1025, "refcount_bits": 64, "lazy_refcounts": True, "then": "compress"},
    "qcow2-vast": {"size": 1 << 33, "cluster_size": 65536},
    "qcow2-data": {"size": 300, "cluster_size": 4096, "data_file": "data"},
    "qcow2-data-raw": {
        "size": 300,
        "cluster_size": 4096,
        "data_file": "data",
        "data_file_raw": True,
    },
    "qcow2-chain": {"size": 400, "cluster_size": 4096, "chain": True, "then": "compress"},
}
_VMDK = ["vmdk", "vmdk-stream", "vmdk-footer", "vmdk-flat", "vmdk-delta", "vmdk-extents"]

KINDS = [*_QCOW2, *_VMDK, "raw"]


@functools.cache
def seed(kind: str) -> dict[str, bytes]:
    """The files of a kind; "image" is the one to open."""
    if kind == "raw":
        return {"image": random.Random(1).randbytes(20_000)}
    return _vmdk(kind) if kind in _VMDK else _qcow2(kind)


def _qcow2(kind: str) -> dict[str, bytes]:
    options = dict(_QCOW2[kind])
    size, then = f"{options.pop('size')}k", options.pop("then", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = folder / "image"
        if options.pop("chain", False):
            (folder / "base").write_bytes(pattern(9, 250_000 // 512 * 512))
            qemu.create(
                folder / "middle",
                "350k",
                cluster_size=4096,
                backing="base",
                backing_fmt="raw",
                writes=["write -P 7 40k 30k", "write -z 90k 20k"],
            )
            options |= {"backing": "middle", "backing_fmt": "qcow2"}
        relative = options.get("data_file")
        if relative:
            options["data_file"] = folder / relative
        qemu.create(image, size, **options)
        writes = [
            "write -P 1 1k 3k",
            "write -P 2 30k 50k",
            "write -P 3 122k 2k",
            "write -z 90k 30k",
        ]
        if then == "compress":
            writes += [f"write -c -P {n} {128 + n * 64}k 64k" for n in (0, 1)][: _room(size)]
        qemu.qemu_io(image, *writes)
        if then == "snapshots":
            for number, snapshot in enumerate(("one", "two"), 4):
                qemu.qemu_img("snapshot", "-c", snapshot, image)
                qemu.qemu_io(image, f"write -P {number} {number * 20}k 30k")
        elif then == "bitmaps":
            qemu.qemu_img("bitmap", "--add", "-g", "64k", image, "kept")
            qemu.qemu_img("bitmap", "--add", "-g", "4096", image, "other")
            qemu.qemu_io(image, "write -P 77 300k 90k")
        if relative:
            _rename_data_file(image, str(folder / relative), relative)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _room(size: str) -> int:
    """How many compressed clusters of 64 KiB fit behind 128 KiB."""
    return (int(size.removesuffix("k")) - 128) // 64


def _rename_data_file(image: Path, old: str, new: str) -> None:
    """qemu-img keeps the data file's name as it was given; make it a relative one."""
    data = bytearray(image.read_bytes())
    at = data.index(old.encode())
    header = at - 8
    end = data.index(b"\0\0\0\0\0\0\0\0", at + len(old) + -len(old) % 8)
    rest = data[at + len(old) + -len(old) % 8 : end]
    changed = bytes(data[header : header + 4]) + len(new).to_bytes(4, "big") + new.encode()
    changed += bytes(-len(new) % 8) + rest
    data[header:end] = changed + bytes(end - header - len(changed))
    image.write_bytes(data)


def _vmdk(kind: str) -> dict[str, bytes]:
    how: dict[str, Any] = {"grain_sectors": _GRAIN_SECTORS}
    if kind == "vmdk-stream":
        how |= {"compressed": True, "descriptor": pack_descriptor('RW 300 SPARSE "image"')}
    elif kind == "vmdk-footer":
        how |= {"compressed": True, "footer": True}
    elif kind == "vmdk-flat":
        text = pack_descriptor('RW 100 FLAT "one" 3', "RW 50 ZERO", 'RW 150 FLAT "two" 0')
        return {"image": text, "one": pattern(1, 103 * 512), "two": pattern(2, 150 * 512)}
    elif kind == "vmdk-extents":
        text = pack_descriptor('RW 300 SPARSE "one"', 'RW 300 SPARSE "two"', "RW 9 ZERO")
        built = build_sparse(_GRAINS, _VMDK_SECTORS, **how)
        return {"image": text, "one": built, "two": built}
    elif kind == "vmdk-delta":
        parent = pack_descriptor('RW 300 SPARSE "base"', cid="12345678")
        base = build_sparse(_GRAINS, _VMDK_SECTORS, descriptor=parent, **how)
        how["descriptor"] = pack_descriptor(
            'RW 300 SPARSE "image"', parent="base", parent_cid="12345678", cid="87654321"
        )
        own = {1: pattern(50, 4096), 3: ZERO_GRAIN}
        return {"image": build_sparse(own, _VMDK_SECTORS, **how), "base": base}
    return {"image": build_sparse(_GRAINS, _VMDK_SECTORS, **how)}
