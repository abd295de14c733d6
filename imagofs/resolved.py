"""The resolved map of a chain: where each granule's bytes are, whatever layer has them.

A lookup walks the chain once per granule and keeps the answer, so that a read through 32
overlays costs what a read of one image costs. Layers below the top never change while they are
open; the top one says what it changed (`FormatDriver.subscribe`), in the same plain function that
changes its tables.

The map is kept in chunks of 512 granules, each an array of 64-bit entries:

    bits 9 and up   host offset; for SPECIAL the number of the layer
    bit 8           IN_PLACE: the top layer's own bytes, which may be overwritten where they are
    bits 0 to 7     index into `storages`, or one of the codes below
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

from .caching import MetadataCache
from .format import base
from .format.base import HOST_OFFSET_MASK, IN_PLACE, STORAGE_MASK, FormatDriver
from .storage.base import Storage

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MIXED", "SPECIAL", "UNRESOLVED", "ZERO", "ResolvedMap", "Run"]

#: Codes in the place of a storage's index.
ZERO = 255  #: reads as zero
SPECIAL = 254  #: compressed, in the layer whose number is in the upper bits
MIXED = 253  #: no single answer for the granule: ask layer by layer
UNRESOLVED = 252  #: not looked up yet
_FIRST_CODE = UNRESOLVED

_CHUNK_GRANULE_BITS = 9
CHUNK_GRANULES = 1 << _CHUNK_GRANULE_BITS
_LARGEST_GRANULE = 2 << 20
_BLANK = array("Q", [UNRESOLVED]) * CHUNK_GRANULES


class Run(NamedTuple):
    """Consecutive guest bytes that are in one place.

    Attributes:
        code: Index into `ResolvedMap.storages`, or a code of this module.
        position: The host offset of the first byte; for SPECIAL the number of the layer.
        length: Bytes.
    """

    code: int
    position: int
    length: int


class NotCached(Exception):
    """A table is needed that is not in memory.

    Attributes:
        driver: Whose table.
        guest_offset: An offset that the table covers.
    """

    def __init__(self, driver: FormatDriver, guest_offset: int) -> None:
        self.driver = driver
        self.guest_offset = guest_offset


class ResolvedMap:
    """The resolved map of the chain `layers`, the top one first.

    Args:
        layers: The drivers. At least one.
        cache: Where chunks are kept.
    """

    def __init__(self, layers: Sequence[FormatDriver], cache: MetadataCache) -> None:
        self.layers = tuple(layers)
        #: Every storage with data, the top layer's first, so that IN_PLACE ones keep their index.
        self.storages: tuple[Storage, ...] = ()
        granules = [layer.granularity for layer in self.layers if layer.granularity]
        #: Guest bytes per entry, a power of two.
        self.granule = min([_LARGEST_GRANULE, *granules])
        self.granule_bits = self.granule.bit_length() - 1
        self.chunk_bits = self.granule_bits + CHUNK_GRANULES.bit_length() - 1
        self.cache = cache
        self.namespace = cache.namespace()
        self._index_storages()
        self.layers[0].subscribe(self.forget)

    def _index_storages(self) -> None:
        """Number the storages; a layer whose storages find no room is asked in the slow way."""
        storages: dict[Storage, int] = {}
        self._numbers: list[tuple[int, ...] | None] = []
        for layer in self.layers:
            new = [s for s in layer.data_storages if s not in storages]
            if not layer.granularity or len(storages) + len(new) > _FIRST_CODE:
                self._numbers.append(None)
                continue
            for storage in new:
                storages[storage] = len(storages)
            self._numbers.append(tuple(storages[s] for s in layer.data_storages))
        self.storages = tuple(storages)

    def entry(self, guest_offset: int) -> int:
        """The entry of the granule that `guest_offset` lies in. A plain function.

        Raises:
            NotCached: Load the table and ask again.
        """
        chunk = self._chunk(guest_offset >> self.chunk_bits)
        index = guest_offset >> self.granule_bits & CHUNK_GRANULES - 1
        entry = chunk[index]
        if entry == UNRESOLVED:
            entry = chunk[index] = self._resolve(
                guest_offset >> self.granule_bits << self.granule_bits
            )
        return entry

    def _chunk(self, number: int) -> array[int]:
        chunk = self.cache.get(self.namespace + number)
        if chunk is None:
            chunk = _BLANK[:]
            self.cache.put(self.namespace + number, chunk)
        return chunk

    def _entries(self, first: int, last: int) -> array[int]:
        """The entries of granules of one chunk, `last` included.

        Raises:
            NotCached: Load the table and ask again.
        """
        chunk = self._chunk(first // CHUNK_GRANULES)
        start = first & CHUNK_GRANULES - 1
        entries = chunk[start : start + last - first + 1]
        if UNRESOLVED in entries:
            for index, entry in enumerate(entries):
                if entry == UNRESOLVED:
                    entry = self._resolve(first + index << self.granule_bits)
                    entries[index] = chunk[start + index] = entry
        return entries

    def _resolve(self, guest_offset: int) -> int:
        """Walk the chain for the granule that begins at `guest_offset`."""
        granule = self.granule
        for number, layer in enumerate(self.layers):
            numbers = self._numbers[number]
            if numbers is None:
                return MIXED
            if number and guest_offset + granule > layer.size():
                # The end of a shorter lower layer reads as zeroes.
                return ZERO if guest_offset >= layer.size() else MIXED
            answer = layer.entry_at(guest_offset)
            if answer >= 0:
                in_place = answer & IN_PLACE if number == 0 else 0
                return answer & HOST_OFFSET_MASK | in_place | numbers[answer & STORAGE_MASK]
            if answer == base.INDIRECT:
                continue
            if answer == base.ZERO:
                return ZERO
            if answer == base.SPECIAL:
                return number << 9 | SPECIAL
            if answer == base.NOT_CACHED:
                raise NotCached(layer, guest_offset)
            return MIXED
        return ZERO

    def runs(self, guest_offset: int, length: int, *, in_place: bool = False) -> list[Run]:
        """The places of a range, neighbours merged. A plain function.

        Args:
            guest_offset: Where the range begins.
            length: Bytes, above zero.
            in_place: An empty list is returned if a part may not be overwritten where it is.

        Raises:
            NotCached: Load the table and ask again.
        """
        runs: list[Run] = []
        granule = self.granule
        end = guest_offset + length
        first = guest_offset >> self.granule_bits
        last = end - 1 >> self.granule_bits
        position = first << self.granule_bits  # where the granule begins
        start = guest_offset  # where the run begins
        begun = expected = -1  # the run's first entry, and the one that would continue it
        step = 0
        mask = -1 if in_place else ~IN_PLACE
        while first <= last:
            until = min(last, first | CHUNK_GRANULES - 1)
            for entry in self._entries(first, until):
                entry &= mask
                if entry != expected:
                    if begun >= 0:
                        runs.append(_run(begun, start, position, granule))
                        start = position
                    if in_place and not entry & IN_PLACE:
                        return []
                    begun = expected = entry
                    step = granule if entry & STORAGE_MASK < _FIRST_CODE else 0
                expected += step
                position += granule
            first = until + 1
        runs.append(_run(begun, start, end, granule))
        return runs

    def places(self, guest_offset: int, length: int) -> list[tuple[int, int, int]] | None:
        """The places of a range, if all are known and in storages. A plain function.

        What `runs` gives, for who cannot wait: in plain tuples, and in a third of the time.

        Returns:
            Index into `storages`, host offset and length of each; None: ask `runs`.
        """
        bits = self.granule_bits
        first = guest_offset >> bits
        last = guest_offset + length - 1 >> bits
        if (first ^ last) >> _CHUNK_GRANULE_BITS:
            return None
        chunk = self.cache.get(self.namespace + (first >> _CHUNK_GRANULE_BITS))
        if chunk is None:
            return None
        granule = self.granule
        start = guest_offset  # where the place begins
        position = first << bits  # where the granule begins
        index = first & CHUNK_GRANULES - 1
        expected = -1
        code = host_offset = 0
        places = []
        for entry in chunk[index : index + last - first + 1]:
            entry &= ~IN_PLACE
            if entry != expected:
                if expected >= 0:
                    places.append((code, host_offset, position - start))
                    start = position
                code = entry & STORAGE_MASK
                if code >= _FIRST_CODE:
                    return None
                host_offset = (entry & HOST_OFFSET_MASK) + start - position
                expected = entry
            expected += granule
            position += granule
        places.append((code, host_offset, guest_offset + length - start))
        return places

    def forget(self, guest_offset: int, length: int) -> None:
        """Look the range up anew: the top layer's mapping changed. A plain function."""
        first = guest_offset >> self.granule_bits
        last = guest_offset + length - 1 >> self.granule_bits
        bits = self.chunk_bits - self.granule_bits
        if last - first > 64 * CHUNK_GRANULES:
            self.cache.drop_namespace(self.namespace)
            return
        while first <= last:
            number = first >> bits
            until = min(last, (number + 1 << bits) - 1)
            chunk = self.cache.get(self.namespace + number)
            if chunk is not None:
                start = first & CHUNK_GRANULES - 1
                count = until - first + 1
                chunk[start : start + count] = _BLANK[:count]
            first = until + 1


def _run(entry: int, start: int, end: int, granule: int) -> Run:
    """The run from `start` to `end`, whose first granule has `entry`."""
    code = entry & STORAGE_MASK
    if code < _FIRST_CODE:
        return Run(code, (entry & HOST_OFFSET_MASK) + (start & granule - 1), end - start)
    return Run(code, entry >> 9, end - start)
