"""Changes to images that know where structures are. A *recipe*, a few bytes, says which.

The same recipe makes the same case, whoever came up with it: hypothesis, atheris or a plain loop of
random bytes. A recipe that has ended says 0 from then on, and a choice of 0 is the simplest one.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.case import Case
from tests.fuzz.seeds import KINDS, seed
from tests.qcow2.damage import COMPRESSED, COPIED, OFFSET, Image

__all__ = ["HEADER_FIELDS", "NAMES", "STREAMS", "case_of", "corpus"]


class _Choices(random.Random):
    """A source of choices that reads them from bytes."""

    def __new__(cls, recipe: bytes) -> _Choices:
        return super().__new__(cls)  # the base class would take the recipe for a seed

    def __init__(self, recipe: bytes) -> None:
        super().__init__(0)
        self._rest = recipe

    def getrandbits(self, k: int, /) -> int:
        size = k + 7 >> 3
        taken, self._rest = self._rest[:size], self._rest[size:]
        return int.from_bytes(taken.ljust(size, b"\0"), "little") & (1 << k) - 1


class Place(NamedTuple):
    """A number in a file."""

    offset: int
    size: int


Places = dict[str, list[Place]]
#: Changes some bytes.
Change = Callable[[_Choices, bytearray], None]

_ROUND = [1 << bits for bits in (8, 9, 12, 15, 16, 20, 21, 24, 31, 32, 40, 47, 55, 56, 61, 62, 63)]

#: What an image may say that another file is called.
NAMES = [
    b"base",
    b"image",
    b"./image",
    b"../inside/image",
    b"../outside",
    b"outside\0",
    b"/dev/stdin",
    b"/dev/zero",
    b"/etc/passwd",
    b"/proc/self/mem",
    b"nbd://127.0.0.1/",
    b"nbd:unix:/socket",
    b"json:{}",
    b'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
    b"file:base",
    b"file:../outside",
    b"fat:rw:/",
    b"..",
    b".",
    b"",
    b"\xff\xfe",
    b"a\nb",
    b"%s%n\x1b[2J",
    b"x" * 1023,
    b"data",
    b"one",
]


def corpus() -> list[bytes]:
    """The recipes that are kept: each has led an earlier run to code that no other had reached."""
    lines = Path(__file__).with_name("corpus.txt").read_text().split()
    return [bytes.fromhex(line) for line in lines]


def case_of(recipe: bytes) -> Case:
    """The case of a recipe."""
    chance = _Choices(recipe)
    kind = chance.choice(KINDS)
    files = {name: bytearray(data) for name, data in seed(kind).items()}
    sizes: dict[str, int] = {}
    for _ in range(chance.randrange(5)):
        name = "image"
        if len(files) > 1 and not chance.randrange(3):
            name = chance.choice(sorted(files))
        _change(chance, files[name])
        if not chance.randrange(10):
            _resize(chance, name, files, sizes)
    if kind.startswith("qcow2") and not chance.randrange(20):
        files = _as_backing_file(chance, files, sizes)
    form = None
    if not chance.randrange(20):
        form = chance.choice(["raw", "qcow2", "vmdk"])
    return Case(kind, {name: bytes(data) for name, data in files.items()}, sizes, form)


def _change(chance: _Choices, data: bytearray) -> None:
    changes = [_flip, _flip, _fill, _copy]
    if data[:4] == b"QFI\xfb" and len(data) > 512:
        changes = [_number_of_qcow2] * 8 + [_extension, _name, _stream, _bomb, *changes]
    elif data[:4] == b"KDMV" and len(data) > 512:
        changes = [_number_of_vmdk] * 8 + [_descriptor, _marker, *changes]
    elif data[:1] == b"#":
        changes = [_descriptor] * 12 + changes
    change: Change = chance.choice(changes)
    try:
        change(chance, data)
    except (LookupError, ValueError, struct.error):
        pass  # it went by what an earlier change has destroyed


# --- any file -------------------------------------------------------------------------------------


def _flip(chance: _Choices, data: bytearray) -> None:
    place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)


def _fill(chance: _Choices, data: bytearray) -> None:
    place, length = chance.randrange(len(data)), chance.choice([1, 8, 16, 512, 4096])
    length = min(length, len(data) - place)
    data[place : place + length] = chance.choice([b"\0", b"\xff", b"\x80"]) * length


def _copy(chance: _Choices, data: bytearray) -> None:
    """Put one block over another."""
    length = chance.choice([512, 8, 1024, 4096])
    source = chance.randrange(len(data) // length) * length
    target = chance.randrange(len(data) // length) * length
    data[target : target + length] = data[source : source + length]


def _resize(
    chance: _Choices, name: str, files: dict[str, bytearray], sizes: dict[str, int]
) -> None:
    if chance.randrange(2):
        del files[name][chance.randrange(len(files[name]) + 1) :]
    else:
        sizes[name] = len(files[name]) + chance.choice([1, 512, 1 << 20, 1 << 32, 1 << 41, 1 << 50])


def _as_backing_file(
    chance: _Choices, files: dict[str, bytearray], sizes: dict[str, int]
) -> dict[str, bytearray]:
    """The image below a good one."""
    top = seed("qcow2-chain")["image"]
    at = top.index(b"middle")
    files = dict(files)
    files["middle"] = files.pop("image")
    if "image" in sizes:
        sizes["middle"] = sizes.pop("image")
    files["image"] = bytearray(top[:at] + b"middle" + top[at + 6 :])
    return files


# --- qcow2 ----------------------------------------------------------------------------------------

#: Offset and size of each field of the header.
HEADER_FIELDS = {
    "version": Place(4, 4),
    "backing name's offset": Place(8, 8),
    "backing name's length": Place(16, 4),
    "cluster bits": Place(20, 4),
    "size": Place(24, 8),
    "encryption": Place(32, 4),
    "L1 entries": Place(36, 4),
    "L1 offset": Place(40, 8),
    "refcount table": Place(48, 8),
    "refcount table's clusters": Place(56, 4),
    "snapshots": Place(60, 4),
    "snapshot table": Place(64, 8),
    "incompatible": Place(72, 8),
    "compatible": Place(80, 8),
    "autoclear": Place(88, 8),
    "refcount order": Place(96, 4),
    "header length": Place(100, 4),
    "compression type": Place(104, 1),
}

# Offsets and sizes of the fields of a snapshot table's entry, and of a bitmap directory's.
_SNAPSHOT = ((0, 8), (8, 4), (12, 2), (14, 2), (32, 4), (36, 4), (40, 8), (48, 8))
_BITMAP = ((0, 8), (8, 4), (12, 4), (16, 1), (17, 1), (18, 2), (20, 4))


class _Shared(Image):
    """An image whose bytes are those given, not a copy."""

    def __init__(self, data: bytearray) -> None:
        super().__init__(bytes(data[:512]))
        self.data = data


def _image(data: bytearray) -> Image:
    if not 9 <= int.from_bytes(data[20:24], "big") <= 21:
        raise ValueError("there are no clusters to go by")
    return _Shared(data)


def _places(image: Image) -> Places:
    """Where the numbers of a qcow2 image are; what cannot be followed is left out."""
    found = {"header": [*HEADER_FIELDS.values()]}
    end, cluster = len(image.data), image.cluster

    def words(start: int, count: int) -> list[Place]:
        return [Place(at, 8) for at in range(start, min(start + count * 8, end - 8), 8)]

    found["l1"] = words(image.l1, min(image.u32(36), 64))
    tables = [image.u64(at) & OFFSET for at, _ in found["l1"]]
    entries = [place for table in tables if table for place in words(table, cluster // 8)]
    found["l2 used"] = [place for place in entries if image.u64(place.offset)]
    found["l2"] = entries[:2000]
    found["reftable"] = words(image.reftable, 4)
    block = image.u64(image.reftable)
    found["refcounts"] = [Place(at, 2) for at in range(block, min(block + 400, end - 2), 2)]
    if count := min(image.u32(60), 8):
        at, snapshots = image.u64(64), []
        for _ in range(count):
            snapshots += [Place(at + offset, size) for offset, size in _SNAPSHOT]
            length = 40 + image.u32(at + 36) + (image.u32(at + 12) >> 16)
            at += (length + (image.u32(at + 12) & 0xFFFF) + 7) & ~7
        found["snapshots"] = snapshots
        table = image.u64(image.u64(64))
        found["snapshot l1"] = words(table, 2)
        found["snapshot l2"] = words(image.u64(table) & OFFSET, 64)
    if b"\x23\x85\x28\x75" in image.data[:cluster]:
        at = image.bitmap_extension()
        extension = [Place(at + o, s) for o, s in ((4, 4), (8, 4), (12, 4), (16, 8), (24, 8))]
        at = image.bitmap_directory()
        directory = [Place(at + offset, size) for offset, size in _BITMAP]
        found["bitmaps"] = extension + directory + words(image.u64(at), 4)
    return {kind: places for kind, places in found.items() if places}


def _number_of_qcow2(chance: _Choices, data: bytearray) -> None:
    image = _image(data)
    places = _places(image)
    at, size = chance.choice(places[chance.choice(sorted(places))])
    old = int.from_bytes(data[at : at + size], "big")
    structures = [image.l1, image.reftable, image.u64(image.reftable), image.u64(64), image.end]
    structures += [image.u64(image.l1) & OFFSET]
    if "l2 used" in places:
        other = image.u64(chance.choice(places["l2 used"]).offset)
        structures += [other, other & OFFSET]
    value = _another(chance, old, size * 8, structures)
    if size == 8 and at > 512 and not chance.randrange(3):
        value |= chance.choice([COPIED, 1, COMPRESSED, COPIED | COMPRESSED])
    data[at : at + size] = (value & (1 << size * 8) - 1).to_bytes(size, "big")
    if size == 8 and image.entry_size == 16 and at > 512 and not chance.randrange(3):
        data[at + 8 : at + 16] = chance.choice([b"\0" * 8, b"\xff" * 8, b"\0\0\0\1" * 2])


def _another(chance: _Choices, old: int, bits: int, structures: list[int]) -> int:
    """A number in place of `old`."""
    way = chance.randrange(7)
    if way == 0:
        return chance.choice([0, 1, (1 << bits) - 1, (1 << bits - 1) - 1])
    if way == 1:
        return max(old + chance.choice([1, -1, 2, 8, 512, -512, 4096]), 0)
    if way == 2:
        return old ^ 1 << chance.randrange(bits)
    if way == 3:
        return chance.choice(_ROUND) + chance.choice([0, -1, 1])
    if way == 4:
        return chance.choice(structures) + chance.choice([0, 0, 512, 1, 1 << 16])
    if way == 5:
        return chance.choice(structures) | COPIED
    return chance.getrandbits(bits)


def _extension(chance: _Choices, data: bytearray) -> None:
    """Put a header extension before the others."""
    start = int.from_bytes(data[100:104], "big") if data[7] > 2 else 72
    kinds = [0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 0x12345678, 0]
    body = chance.choice([b"", b"raw", b"qcow2", b"vmdk", b"\0" * 48, b"\xff" * 24, *NAMES])
    length = len(body) if chance.randrange(3) else chance.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 60])
    extension = struct.pack(">II", chance.choice(kinds), length) + body + bytes(-len(body) % 8)
    end = 4096 if len(data) > 4096 else 512
    data[start:end] = (bytes(extension) + data[start:end])[: end - start]


def _name(chance: _Choices, data: bytearray) -> None:
    """Give the image a backing file."""
    name = chance.choice(NAMES)
    at = 400 if len(name) < 100 else 1024
    data[at : at + len(name)] = name
    length = len(name) + chance.choice([0, 0, 0, 1, 1024 - len(name)])
    data[8:20] = struct.pack(">QI", at, length & 0xFFFFFFFF)


def _compressed(chance: _Choices, image: Image) -> Place:
    """The L2 entry of a compressed cluster."""
    places = _places(image)["l2 used"]
    return chance.choice([p for p in places if image.u64(p.offset) & COMPRESSED])


def _stream(chance: _Choices, data: bytearray) -> None:
    """Damage the stream of a compressed cluster."""
    image = _image(data)
    entry = image.u64(_compressed(chance, image).offset)
    start = entry & (1 << 70 - image.u32(20)) - 1
    at = start + chance.randrange(64)
    data[at] = chance.choice([0, 0xFF, data[at] ^ 1, data[at] ^ 0x80])


def _bomb(chance: _Choices, data: bytearray) -> None:
    """Let a cluster's stream make nothing, much more, or end too early."""
    image = _image(data)
    place = _compressed(chance, image).offset
    stream = STREAMS[chance.randrange(len(STREAMS))]
    sectors = (len(stream) + 511) // 512 - chance.randrange(2)
    at = len(data)
    data += stream
    shift = 70 - image.u32(20)
    most = (1 << image.u32(20) - 8) - 1
    image.put(place, COMPRESSED | min(max(sectors - 1, 0), most) << shift | at)


def _deflated(data: bytes) -> bytes:
    worker = zlib.compressobj(9, zlib.DEFLATED, -15)
    return worker.compress(data) + worker.flush()


STREAMS = [
    _deflated(b""),
    _deflated(bytes(16 << 20)),
    _deflated(b"x" * 4095),
    _deflated(bytes(70000))[:-3],
    b"\x28\xb5\x2f\xfd\x04\x58\x45\x00\x00\x10\x00\x00\x01\x00\xff\xff\xff\x0f\x02\x00\x00\x00",
    # zstd with a window of terabytes
    b"\x28\xb5\x2f\xfd\x00\xff\x01\x00\x00",
    b"\x28\xb5\x2f\xfd\xe0\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00\x00",
]


# --- VMDK -----------------------------------------------------------------------------------------

_SPARSE = [
    *((4, 4), (8, 4), (12, 8), (20, 8), (28, 8), (36, 8), (44, 4), (48, 8), (56, 8), (64, 8)),
    *((72, 1), (73, 4), (77, 2)),
]


def _number_of_vmdk(chance: _Choices, data: bytearray) -> None:
    header = len(data) - 1024 if data[56:64] == b"\xff" * 8 else 0
    places = {"header": [Place(*place) for place in _SPARSE]}
    if header:
        places["footer"] = [Place(header + at, size) for at, size in _SPARSE]
    directory = int.from_bytes(data[header + 56 : header + 64], "little") * 512
    places["directory"] = [Place(directory + 4 * n, 4) for n in range(4)]
    table = int.from_bytes(data[directory : directory + 4], "little") * 512
    places["table"] = [Place(table + 4 * n, 4) for n in range(8)]
    at, size = chance.choice(places[chance.choice(sorted(places))])
    old = int.from_bytes(data[at : at + size], "little")
    structures = [directory // 512, table // 512, len(data) // 512, 0, 1]
    value = _another(chance, old, size * 8, structures) & (1 << size * 8) - 1
    if at + size <= len(data):
        data[at : at + size] = value.to_bytes(size, "little")


def _marker(chance: _Choices, data: bytearray) -> None:
    """Change what stands at the beginning of a grain or marker."""
    at = chance.randrange(len(data) // 512) * 512
    what = chance.randrange(3)
    if what == 0:
        struct.pack_into("<Q", data, at, chance.choice([0, 1, 8, 300, (1 << 64) - 1]))
    elif what == 1:
        struct.pack_into("<I", data, at + 8, chance.choice([0, 1, 500, 1 << 20, (1 << 32) - 1]))
    else:
        bomb = zlib.compress(bytes(16 << 20), 9)[: len(data) - at - 12]
        data[at + 8 : at + 12] = len(bomb).to_bytes(4, "little")
        data[at + 12 : at + 12 + len(bomb)] = bomb


def _descriptor(chance: _Choices, data: bytearray) -> None:
    """Change a line of the text, wherever it is."""
    start = data.index(b"# Disk")
    end = data.find(b"\0", start)
    end = len(data) if end < 0 else end
    lines = bytes(data[start:end]).split(b"\n")
    number = chance.randrange(len(lines))
    line, way = lines[number], chance.randrange(6)
    if way == 0:
        del lines[number]
    elif way == 1:
        lines[number:number] = [line] * chance.choice([1, 2, 300])
    elif way == 2:
        words = line.split(b" ")
        words[chance.randrange(len(words))] = chance.choice(
            [b"0", b"-1", b"1", b"18446744073709551616", b"9" * 5000, b"FLAT", b"SPARSE", b"VMFS"]
            + [b"RDONLY", b"NOACCESS", b'"', b"", b"\xff", b"ZERO", b"4294967295", b"1e9"]
        )
        lines[number] = b" ".join(words)
    elif way == 3:
        name = chance.choice(NAMES)
        extent = chance.choice([b'RW 100 FLAT "%b" 0', b'RW 300 SPARSE "%b"', b'RW 9 ZERO "%b"'])
        lines.insert(number, extent % name)
    elif way == 4:
        hint = chance.choice(NAMES)
        lines += [b"parentCID=12345678", b'parentFileNameHint="' + hint + b'"']
    else:
        lines[number] = chance.choice([b"version=", b"CID=", b"parentCID=", b"createType="]) + (
            chance.choice([b"0", b"4", b"ffffffff", b"zz", b'"monolithicFlat"', b"x" * 9999])
        )
    text = b"\n".join(lines)
    data[start:end] = text if end == len(data) else text[: end - start].ljust(end - start, b"\0")
