"""Making a qcow2 image: where everything goes, and in which order it is written.

The layout is decided by pure functions: header, refcount table, refcount blocks, L1 table and,
with preallocation, L2 tables and data clusters, one behind the other, each cluster counted once.

The first sector of the header is written last, after a sync: until everything else is durable the
file is no qcow2 image.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import NoneType

from ...arguments import check_type
from ...errors import OutOfRangeError, UnsupportedError
from ...storage.base import PreallocateMode, Storage
from ...storage.file import FileStorage
from ...vectors import zero_views
from .entries import COPIED, to_big_endian
from .header import (
    COMPRESSION_NAMES,
    COMPRESSION_TYPE,
    EXTENDED_L2,
    EXTERNAL_DATA_FILE,
    FEATURE_NAMES,
    LAZY_REFCOUNTS,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFTABLE_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
    RAW_EXTERNAL_DATA,
    Header,
    feature_name_table,
)

__all__ = ["Layout", "Parameters", "plan_layout", "write_image"]

_SECTOR = 512
_CHUNK = 1 << 20


_NAME = (str, NoneType)
#: Types that the values of `Parameters` may have.
_KINDS: dict[str, tuple[type, ...]] = {
    "size": (int,),
    "version": (int,),
    "cluster_size": (int,),
    "refcount_bits": (int,),
    "backing_file": _NAME,
    "backing_format": _NAME,
    "data_file": _NAME,
    "data_file_raw": (bool,),
    "extended_l2": (bool,),
    "compression_type": (str,),
    "lazy_refcounts": (bool,),
    "preallocate": (PreallocateMode,),
}


@dataclass(frozen=True, slots=True)
class Parameters:
    """What an image is to be like. `check` says whether it can be.

    Attributes:
        size: The guest disk's size in bytes, a multiple of 512.
        version: 2 or 3.
        cluster_size: Bytes of a cluster, a power of two from 512 to 2 MiB.
        refcount_bits: Width of a refcount, a power of two from 1 to 64.
        backing_file: The backing file's name, as the image will have it.
        backing_format: Its format.
        data_file: The external data file's name, as the image will have it.
        data_file_raw: The data file is to show the guest's contents by itself.
        extended_l2: 128-bit L2 entries, with subclusters.
        compression_type: "zlib" or "zstd".
        lazy_refcounts: Programs may postpone refcounts.
        preallocate: NONE; FORMAT_ALLOCATE for all mappings; FULL_ALLOCATE and WRITE_DATA for the
            host space too.
    """

    size: int
    version: int = 3
    cluster_size: int = 1 << 16
    refcount_bits: int = 16
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    data_file_raw: bool = False
    extended_l2: bool = False
    compression_type: str = "zlib"
    lazy_refcounts: bool = False
    preallocate: PreallocateMode = PreallocateMode.NONE

    def check(self) -> None:
        """See that the parameters are possible, each by itself and together.

        Raises:
            OutOfRangeError: A value is none that the format has.
            UnsupportedError: Values contradict each other.
            WrongTypeError: A value of another type.
        """
        for field, kinds in _KINDS.items():
            check_type(field, getattr(self, field), *kinds)
        self._check_values()
        if self.version < 3:
            self._check_version2()
        if self.extended_l2 and self.cluster_size < 1 << MIN_EXTENDED_L2_CLUSTER_BITS:
            raise UnsupportedError(
                f"extended L2 entries need clusters of at least "
                f"{1 << MIN_EXTENDED_L2_CLUSTER_BITS} bytes, not {self.cluster_size}"
            )
        if self.data_file_raw and self.data_file is None:
            raise UnsupportedError("a raw data file is asked for, but no data file is named")
        if self.backing_file is None:
            if self.backing_format is not None:
                raise UnsupportedError("a backing format is given without a backing file")
            return
        if self.backing_format is None:
            raise UnsupportedError(
                f"the format of the backing file {self.backing_file!r} must be given: probing it "
                f"each time would trust what a guest may have written there"
            )
        if self.data_file_raw:
            raise UnsupportedError("a raw data file and a backing file exclude each other")
        if self.preallocate is PreallocateMode.ZERO or (
            self.preallocate is not PreallocateMode.NONE and not self.extended_l2
        ):
            raise UnsupportedError(
                "preallocation would hide the backing file; only extended L2 entries keep both"
            )

    def _check_values(self) -> None:
        if self.size < 0 or self.size % _SECTOR:
            raise OutOfRangeError(f"a disk of {self.size} bytes; it has whole sectors of 512 bytes")
        if self.version not in (2, 3):
            raise OutOfRangeError(f"there is no qcow2 version {self.version!r}, but 2 and 3")
        if not _is_power_of_two(self.cluster_size, 1 << MIN_CLUSTER_BITS, 1 << MAX_CLUSTER_BITS):
            raise OutOfRangeError(
                f"a cluster size of {self.cluster_size} bytes; it is a power of two from "
                f"{1 << MIN_CLUSTER_BITS} to {1 << MAX_CLUSTER_BITS}"
            )
        if not _is_power_of_two(self.refcount_bits, 1, 64):
            raise OutOfRangeError(
                f"a refcount width of {self.refcount_bits} bits; it is a power of two up to 64"
            )
        if self.compression_type not in COMPRESSION_NAMES.values():
            raise OutOfRangeError(
                f"the compression type {self.compression_type!r} is not known; known are "
                f"{', '.join(COMPRESSION_NAMES.values())}"
            )
        for what, name in (("backing file", self.backing_file), ("data file", self.data_file)):
            if name is None:
                continue
            if not name or "\0" in name:
                raise OutOfRangeError(f"the {what} cannot have the name {name!r}")
            try:
                length = len(os.fsencode(name))
            except UnicodeEncodeError as error:
                raise OutOfRangeError(f"the {what} cannot have the name {name!r}") from error
            if length > MAX_BACKING_NAME:
                raise OutOfRangeError(f"the {what}'s name is longer than {MAX_BACKING_NAME} bytes")

    def _check_version2(self) -> None:
        for what, wanted in (
            (f"a refcount width of {self.refcount_bits} bits", self.refcount_bits != 16),
            ("lazy refcounts", self.lazy_refcounts),
            ("extended L2 entries", self.extended_l2),
            ("an external data file", self.data_file is not None),
            (f"compression with {self.compression_type}", self.compression_type != "zlib"),
        ):
            if wanted:
                raise UnsupportedError(f"version 2 images cannot have {what}; use version 3")


def _is_power_of_two(value: int, smallest: int, largest: int) -> bool:
    return smallest <= value <= largest and not value & value - 1


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a new image is. Numbers of clusters, in the order of the file.

    Attributes:
        header: The header.
        blocks: Refcount blocks.
        l1_clusters: Clusters of the L1 table.
        l2_tables: L2 tables, each one cluster.
        data_clusters: Preallocated clusters with guest data; none with an external data file.
    """

    header: Header
    blocks: int
    l1_clusters: int
    l2_tables: int
    data_clusters: int

    @property
    def clusters(self) -> int:
        """All clusters of the file."""
        return self.data_start + self.data_clusters

    @property
    def blocks_start(self) -> int:
        """Number of the first refcount block's cluster."""
        return 1 + self.header.reftable_clusters

    @property
    def l1_start(self) -> int:
        """Number of the L1 table's first cluster."""
        return self.blocks_start + self.blocks

    @property
    def l2_start(self) -> int:
        """Number of the first L2 table's cluster."""
        return self.l1_start + self.l1_clusters

    @property
    def data_start(self) -> int:
        """Number of the first cluster with guest data."""
        return self.l2_start + self.l2_tables


def plan_layout(parameters: Parameters) -> Layout:
    """Decide where everything goes.

    Raises:
        OutOfRangeError, UnsupportedError: As `Parameters.check`; also where the disk is too large
            for the cluster size.
    """
    parameters.check()
    cluster_size = parameters.cluster_size
    header = _header(parameters)
    l1_entries = header.l1_entries_needed
    if l1_entries * 8 > MAX_L1_BYTES:
        raise _too_large(parameters)
    guest_clusters = l2_tables = 0
    # qemu too maps all of a raw data file: what is not mapped would not be read from it.
    if parameters.preallocate not in (PreallocateMode.NONE, PreallocateMode.ZERO) or (
        parameters.data_file_raw
    ):
        guest_clusters = _units(parameters.size, cluster_size)
        l2_tables = l1_entries
    layout = Layout(
        header=replace(header, l1_entries=l1_entries, reftable_clusters=1),
        blocks=1,
        l1_clusters=_units(l1_entries * 8, cluster_size),
        l2_tables=l2_tables,
        data_clusters=0 if header.has_data_file else guest_clusters,
    )
    counts_per_block = cluster_size * 8 // header.refcount_bits
    while True:
        blocks = _units(layout.clusters, counts_per_block)
        table = max(_units(blocks * 8, cluster_size), 1)
        if blocks == layout.blocks and table == layout.header.reftable_clusters:
            break
        layout = replace(
            layout, blocks=blocks, header=replace(layout.header, reftable_clusters=table)
        )
    if layout.header.reftable_clusters * cluster_size > max(MAX_REFTABLE_BYTES, cluster_size):
        raise _too_large(parameters)
    header = replace(
        layout.header,
        reftable_offset=cluster_size,
        l1_offset=layout.l1_start * cluster_size if l1_entries else 0,
    )
    header.encode()  # see that it fits
    return replace(layout, header=header)


def _units(amount: int, unit: int) -> int:
    return -(-amount // unit)


def _too_large(parameters: Parameters) -> OutOfRangeError:
    return OutOfRangeError(
        f"a disk of {parameters.size} bytes is too large for clusters of {parameters.cluster_size} "
        f"bytes; use a larger cluster size"
    )


def _header(parameters: Parameters) -> Header:
    """The header, without the places of the tables."""
    incompatible = EXTENDED_L2 if parameters.extended_l2 else 0
    autoclear = 0
    if parameters.data_file is not None:
        incompatible |= EXTERNAL_DATA_FILE
        autoclear |= RAW_EXTERNAL_DATA if parameters.data_file_raw else 0
    compression = {name: number for number, name in COMPRESSION_NAMES.items()}
    compression_type = compression[parameters.compression_type]
    if compression_type:
        incompatible |= COMPRESSION_TYPE
    header = Header(
        version=parameters.version,
        cluster_bits=parameters.cluster_size.bit_length() - 1,
        size=parameters.size,
        l1_entries=0,
        l1_offset=0,
        reftable_offset=0,
        reftable_clusters=0,
        backing_file=parameters.backing_file,
        backing_format=parameters.backing_format,
        data_file=parameters.data_file,
        incompatible=incompatible,
        compatible=LAZY_REFCOUNTS if parameters.lazy_refcounts else 0,
        autoclear=autoclear,
        refcount_order=parameters.refcount_bits.bit_length() - 1,
        compression_type=compression_type,
    )
    if parameters.version < 3:
        return header
    named = replace(header, other_extensions=((FEATURE_NAMES, feature_name_table()),))
    try:
        named.encode()
    except UnsupportedError:
        # It is only there for messages; the smallest clusters have no room for it.
        return header
    return named


# --- writing --------------------------------------------------------------------------------------


async def write_image(
    storage: Storage,
    data_storage: Storage | None,
    layout: Layout,
    preallocate: PreallocateMode,
) -> None:
    """Write the image, durably.

    If it fails or is cancelled, the file is no qcow2 image.

    Args:
        storage: The image file, with a size of 0 or, where that is fixed, with any contents.
        data_storage: The external data file, likewise, where the layout has one.
        layout: What to write.
        preallocate: What to do with the space for guest data.

    Raises:
        OutOfRangeError: A device is too small.
        StorageError: A storage failed.
    """
    header = layout.header
    cluster_size = header.cluster_size
    if _is_device(storage):
        # What is there may be an image: it must not be one while its tables are overwritten.
        await _write(storage, bytes(_SECTOR), 0)
        await storage.sync()
    start, end = layout.data_start * cluster_size, layout.clusters * cluster_size
    await _claim(storage, start, PreallocateMode.NONE)
    encoded = header.encode().ljust(cluster_size, b"\0")
    await _write(storage, encoded[_SECTOR:], _SECTOR)
    await _write_all(storage, cluster_size, _tables(layout))
    await _claim(storage, end, preallocate, start)
    if data_storage is not None:
        if layout.l2_tables and preallocate is PreallocateMode.NONE:
            preallocate = PreallocateMode.ZERO
        await _claim(data_storage, header.size, preallocate)
        await data_storage.sync()
    await storage.sync()
    await _write(storage, encoded[:_SECTOR], 0)
    await storage.sync()


def _tables(layout: Layout) -> Iterator[bytes]:
    """All that lies between the header and the guest data."""
    header = layout.header
    bits = header.cluster_bits
    first_block = layout.blocks_start
    blocks = array("Q", [first_block + number << bits for number in range(layout.blocks)])
    yield _padded(to_big_endian(blocks), header.reftable_clusters << bits)
    yield from _refcount_blocks(layout)
    table_flag = COPIED if layout.l2_tables else 0
    tables = array(
        "Q", [layout.l2_start + number << bits | table_flag for number in range(layout.l2_tables)]
    )
    yield _padded(to_big_endian(tables), layout.l1_clusters << bits)
    yield from _l2_tables(layout)


def _refcount_blocks(layout: Layout) -> Iterator[bytes]:
    header = layout.header
    per_block = header.cluster_size * 8 // header.refcount_bits
    left = layout.clusters
    full = _ones(per_block, header.refcount_bits)
    for _ in range(layout.blocks):
        if left >= per_block:
            yield full
        else:
            yield _padded(_ones(left, header.refcount_bits), header.cluster_size)
        left -= per_block


def _ones(number: int, bits: int) -> bytes:
    """Refcounts of 1, `number` of them, as a block has them."""
    if bits >= 8:
        return (1).to_bytes(bits // 8, "big") * number
    # Within a byte the lowest bits belong to the first cluster.
    whole = sum(1 << shift for shift in range(0, 8, bits))
    full_bytes, rest = divmod(number, 8 // bits)
    return bytes([whole]) * full_bytes + (bytes([whole & (1 << rest * bits) - 1]) if rest else b"")


def _l2_tables(layout: Layout) -> Iterator[bytes]:
    """L2 tables that map everything.

    With an external data file, host offset equals guest offset. With subclusters none is allocated
    yet: each shows what is below until it is written, and the host space waits for it.
    """
    header = layout.header
    cluster_size = header.cluster_size
    per_table = 1 << header.l2_bits
    base = 0 if header.has_data_file else layout.data_start * cluster_size
    left = _units(header.size, cluster_size)
    for number in range(layout.l2_tables):
        entries = min(left, per_table)
        first = base + number * per_table * cluster_size | COPIED
        table = array("Q", range(first, first + entries * cluster_size, cluster_size))
        if header.extended_l2:
            wide = array("Q", bytes(entries * 16))
            wide[::2] = table
            table = wide
        yield _padded(to_big_endian(table), cluster_size)
        left -= entries


def _padded(data: bytes, length: int) -> bytes:
    return data.ljust(length, b"\0")


async def _claim(storage: Storage, end: int, mode: PreallocateMode, start: int = 0) -> None:
    """Make the storage reach to `end`, with zeroes from `start` on."""
    if not _is_device(storage):
        if mode is PreallocateMode.NONE or mode is PreallocateMode.FORMAT_ALLOCATE:
            mode = PreallocateMode.ZERO
        await storage.resize(end, mode)
        return
    if end > storage.size():
        raise OutOfRangeError(
            f"the device has {storage.size()} bytes, {end} are needed", filename=storage.filename
        )
    if mode is PreallocateMode.WRITE_DATA:
        for offset in range(start, end, _CHUNK):
            await storage.writev(zero_views(min(_CHUNK, end - offset)), offset)
    elif mode is PreallocateMode.FULL_ALLOCATE:
        await storage.write_allocated_zeroes(start, end - start)
    elif start or mode is not PreallocateMode.NONE:
        await storage.write_zeroes(start, end - start)


def _is_device(storage: Storage) -> bool:
    """Whether the storage's size is fixed."""
    return isinstance(storage, FileStorage) and storage.is_block_device


async def _write_all(storage: Storage, offset: int, parts: Iterable[bytes]) -> None:
    """Write `parts` one behind the other, in steps of some size."""
    held: list[bytes] = []
    length = 0
    for part in parts:
        held.append(part)
        length += len(part)
        if length >= _CHUNK:
            await storage.writev([memoryview(data) for data in held], offset)
            offset += length
            held, length = [], 0
    if held:
        await storage.writev([memoryview(data) for data in held], offset)


async def _write(storage: Storage, data: bytes, offset: int) -> None:
    if data:
        await storage.writev([memoryview(data)], offset)
