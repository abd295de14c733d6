"""`imagofs info IMAGE`: what an image is made of, from its headers alone."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

from . import Parser
from .text import FORMATS, format_size, printable

if TYPE_CHECKING:
    from ..format.base import FormatDriver
    from ..format.qcow2.header import Header
    from ..storage.base import Storage

__all__ = ["describe", "describe_chain", "main"]


def main(arguments: list[str]) -> int:
    """Describe the image."""
    parser = Parser(
        prog="imagofs info",
        description="Say what IMAGE is made of. Only headers are read, and no lock is taken.",
    )
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--json", action="store_true", help="as qemu-img info --output=json")
    parser.add_argument(
        "--chain", action="store_true", help="describe the backing files below it as well"
    )
    parser.add_argument("-f", "--format", choices=FORMATS, help="default: probed")
    words = parser.parse_args(arguments)
    import trio

    gather = describe_chain if words.chain else describe
    layers: list[dict[str, Any]] = trio.run(gather, words.image, words.format)
    if words.json:
        print(json.dumps(layers if words.chain else layers[0], indent=4))
    else:
        print("\n\n".join(_text(layer) for layer in layers))
    return 0


async def describe(image: str, format_name: str | None = None) -> list[dict[str, Any]]:
    """The facts of one image, as `qemu-img info --output=json` names them, in a list of one.

    What the image refers to is not opened, but for the extents of a VMDK, which are parts of it.

    Raises:
        FormatError: Not an image of the format, truncated, or with fields that cannot be right.
        UnsupportedError: It needs something that imagofs does not know.
        StorageError: The file cannot be opened or read.
    """
    from ..format import probe_format
    from ..format.qcow2.loading import read_header
    from ..format.raw import Raw
    from ..gate import PermissiveImplicitOpenGate
    from ..storage.file import FileStorage

    storage = await FileStorage.open(image)
    async with storage:
        if format_name is None:
            first = bytearray(min(4096, storage.size()))
            await storage.readv([memoryview(first)], 0)
            format_name = probe_format(bytes(first))
        if format_name == "qcow2":
            header = await read_header(storage, encrypted_too=True)
            return [await _qcow2_facts(image, storage, header)]
        if format_name == "raw":
            return [await _facts(image, Raw(storage))]
    from ..format.vmdk import Vmdk

    driver = await Vmdk.open(image, backing=None, gate=PermissiveImplicitOpenGate())
    try:
        return [await _facts(image, driver)]
    finally:
        await driver.close()


async def describe_chain(image: str, format_name: str | None = None) -> list[dict[str, Any]]:
    """The facts of an image and of everything below it, the top first.

    Raises:
        As `describe`, and ChainError where a backing file cannot be opened.
    """
    from ..gate import PermissiveImplicitOpenGate
    from ..opening import open_image

    access = await open_image(image, format=format_name, gate=PermissiveImplicitOpenGate())
    async with access:
        layers: list[dict[str, Any]] = []
        for driver in access.layers():
            layers.append(await _facts(image, driver))
            image = layers[-1].get("full-backing-filename", "")
        return layers


async def _facts(image: str, driver: FormatDriver) -> dict[str, Any]:
    """The facts of an open layer."""
    from ..format.qcow2.driver import Qcow2
    from ..format.vmdk import Vmdk

    if isinstance(driver, Qcow2):
        return await _qcow2_facts(image, driver.storages[0], driver.header)
    facts: dict[str, Any] = {
        "filename": image,
        "format": driver.format_name,
        "virtual-size": driver.size(),
        "actual-size": sum(_actual_size(storage) for storage in driver.storages),
        "dirty-flag": False,
    }
    if isinstance(driver, Vmdk):
        if driver.cluster_size:
            facts["cluster-size"] = driver.cluster_size
        if driver.descriptor is not None and driver.descriptor.parent_name:
            facts |= _backing_facts(image, driver.descriptor.parent_name, "vmdk")
    details = driver.details()
    if details:
        facts["format-specific"] = {"type": driver.format_name, "data": details}
    return facts


async def _qcow2_facts(image: str, storage: Storage, header: Header) -> dict[str, Any]:
    from ..format.qcow2.bitmaps import read_bitmaps
    from ..format.qcow2.facts import format_facts, snapshot_facts
    from ..format.qcow2.snapshots import read_snapshots

    facts: dict[str, Any] = {
        "filename": image,
        "format": "qcow2",
        "virtual-size": header.size,
        "actual-size": _actual_size(storage),
        "cluster-size": header.cluster_size,
        "dirty-flag": header.dirty,
    }
    if header.crypt_method:
        facts["encrypted"] = True
    if header.backing_file is not None:
        facts |= _backing_facts(image, header.backing_file, header.backing_format)
    snapshots = await read_snapshots(storage, header)
    if snapshots:
        facts["snapshots"] = [snapshot_facts(snapshot) for snapshot in snapshots]
    data = format_facts(header, await read_bitmaps(storage, header))
    facts["format-specific"] = {"type": "qcow2", "data": data}
    return facts


def _actual_size(storage: Storage) -> int:
    """Host space of a file; as for qemu-img, a device takes none."""
    return 0 if getattr(storage, "is_block_device", False) else storage.allocated_bytes()


def _backing_facts(image: str, name: str, format_name: str | None) -> dict[str, Any]:
    facts = {"backing-filename": name, "full-backing-filename": _full_name(image, name)}
    if format_name:
        facts["backing-filename-format"] = format_name
    return facts


def _full_name(image: str, name: str) -> str:
    """A name that `image` has in it, from the working directory if it counts from the image."""
    if re.match(r"[A-Za-z0-9+.-]+:", name) or os.path.isabs(name):
        return name
    return image[: image.rfind("/") + 1] + name


def _text(facts: dict[str, Any]) -> str:
    """The facts as lines for people."""
    size = facts["virtual-size"]
    lines = [
        f"image: {printable(facts['filename'])}",
        f"file format: {facts['format']}",
        f"virtual size: {format_size(size)} ({size} bytes)",
        f"disk size: {format_size(facts['actual-size'])}",
    ]
    if facts.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in facts:
        lines.append(f"cluster size: {facts['cluster-size']}")
    if "backing-filename" in facts:
        name, full_name = facts["backing-filename"], facts["full-backing-filename"]
        where = f" (actual path: {printable(full_name)})" if full_name != name else ""
        lines.append(f"backing file: {printable(name)}{where}")
    if "backing-filename-format" in facts:
        lines.append(f"backing file format: {printable(facts['backing-filename-format'])}")
    if facts["dirty-flag"]:
        lines.append("dirty: yes (its refcounts are rebuilt when it is opened for writing)")
    if "snapshots" in facts:
        from .snapshot import snapshot_table

        lines += ["snapshots:", *_indented(snapshot_table(facts["snapshots"]).splitlines())]
    if "format-specific" in facts:
        lines.append("format specific information:")
        lines += _indented(_nested(facts["format-specific"]["data"]))
    return "\n".join(lines)


def _nested(data: dict[str, Any]) -> list[str]:
    """Facts of any depth, as indented lines."""
    lines: list[str] = []
    for key, value in data.items():
        name = key.replace("-", " ")
        if isinstance(value, dict):
            lines += [f"{name}:", *_indented(_nested(value))]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, element in enumerate(value):
                lines += [f"{name} {number}:", *_indented(_nested(element))]
        elif isinstance(value, list):
            lines.append(f"{name}: {', '.join(map(str, value)) or 'none'}")
        elif value != "":
            text = str(value).lower() if isinstance(value, bool) else str(value)
            lines.append(f"{name}: {printable(text)}")
    return lines


def _indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]
