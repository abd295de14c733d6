"""The resolved map of a chain: where each granule's bytes are, whatever layer has them.

A lookup walks the chain once and keeps the answers, so that a read through 32 overlays costs what a
read of one image costs. What a range has of granules that were not looked up yet is looked up in
one walk: most layers say of all of them at a time that they have none. So is a block of 16 as soon
as somebody asks for a second granule of it. Layers below the top never change while they are open;
the top one says what it changed (`FormatDriver.subscribe`), in the same plain function that changes
its tables.

The map is kept in chunks of 512 granules, each an array of 64-bit entries:

    bits 9 and up   host offset; for SPECIAL the number of the layer
    bit 8           IN_PLACE: the top layer's own bytes, which may be overwritten where they are
    bits 0 to 7     index into `storages`, or one of the codes below
"""

from __future__ import annotations

from array import array
from contextlib import suppress
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
#: Who comes back to a block of so many will come to the rest of it.
_BLOCK_GRANULES = 16
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
        """Number the storages, up to a layer that has to be asked in the slow way.

        Such a layer has no granules, or there is no room for its storages' numbers.
        """
        storages: dict[Storage, int] = {}
        #: The layers that are walked, and for each the numbers of its storages.
        self._walked: list[FormatDriver] = []
        self._numbers: list[tuple[int, ...]] = []
        #: The entry of what none of them has.
        self._rest = ZERO
        for layer in self.layers:
            new = [s for s in layer.data_storages if s not in storages]
            if not layer.granularity or len(storages) + len(new) > _FIRST_CODE:
                self._rest = MIXED
                break
            for storage in new:
                storages[storage] = len(storages)
            self._walked.append(layer)
            self._numbers.append(tuple(storages[s] for s in layer.data_storages))
        self.storages = tuple(storages)

    def entry(self, guest_offset: int) -> int:
        """The entry of the granule that `guest_offset` lies in. A plain function.

        Raises:
            NotCached: Load the table and ask again.
        """
        chunk = self._chunk(guest_offset >> self.chunk_bits)
        number = guest_offset >> self.granule_bits
        index = number & CHUNK_GRANULES - 1
        if chunk[index] == UNRESOLVED:
            self._resolve_one(chunk, number)
        return chunk[index]

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
        chunk = self._chunk(first >> _CHUNK_GRANULE_BITS)
        start = first & CHUNK_GRANULES - 1
        stop = start + last - first + 1
        entries = chunk[start:stop]
        if UNRESOLVED in entries:
            bits = self.granule_bits
            if first == last:
                self._resolve_one(chunk, first)
            else:
                numbers = enumerate(entries, first)
                self._resolve_many(chunk, [n << bits for n, e in numbers if e == UNRESOLVED])
            entries = chunk[start:stop]
        return entries

    def _resolve_one(self, chunk: array[int], number: int) -> None:
        """Look up one granule of `chunk`; all of its block if that is not the first of it.

        Raises:
            NotCached: Load the table and ask again.
        """
        index = number & CHUNK_GRANULES - 1
        bits = self.granule_bits
        start = index & -_BLOCK_GRANULES
        block = chunk[start : start + _BLOCK_GRANULES]
        if 1 < block.count(UNRESOLVED) < _BLOCK_GRANULES:
            numbers = enumerate(block, number - index + start)
            pending = [n << bits for n, e in numbers if e == UNRESOLVED]
            end = self.layers[0].size()
            with suppress(Exception):  # what is wrong with the others is not this one's concern
                self._resolve_many(chunk, [offset for offset in pending if offset < end])
        if chunk[index] == UNRESOLVED:
            chunk[index] = self._resolve(number << bits)

    def _resolve(self, guest_offset: int) -> int:
        """Walk the chain for the granule that begins at `guest_offset`."""
        granule = self.granule
        for depth, layer in enumerate(self._walked):
            if depth and guest_offset + granule > layer.size():
                return _beyond(layer, guest_offset)
            answer = layer.entry_at(guest_offset)
            if answer != base.INDIRECT:
                return self._entry_of(answer, depth, guest_offset)
        return self._rest

    def _resolve_many(self, chunk: array[int], pending: list[int]) -> None:
        """Walk the chain once for many granules, where `_resolve` would once for each.

        Args:
            chunk: Their entries, each of which is set as soon as it is known.
            pending: Where the granules begin, in guest offsets, ascending: all that are
                UNRESOLVED between the first and the last of them.

        Raises:
            NotCached: Load the table and ask again for those that still are UNRESOLVED.
        """
        granule, bits, mask = self.granule, self.granule_bits, CHUNK_GRANULES - 1
        left = len(pending)
        for depth, layer in enumerate(self._walked):
            if depth and pending[-1] + granule > layer.size():
                last = layer.size() - granule
                for offset in pending:
                    if offset > last and chunk[offset >> bits & mask] == UNRESOLVED:
                        chunk[offset >> bits & mask] = _beyond(layer, offset)
                        left -= 1
                if not left:
                    return
                pending = [offset for offset in pending if offset <= last]
            count = (pending[-1] - pending[0] >> bits) + 1
            for offset, answer in layer.entries_at(pending[0], granule, count):
                index = offset >> bits & mask
                if chunk[index] == UNRESOLVED:  # else a layer above has it
                    chunk[index] = self._entry_of(answer, depth, offset)
                    left -= 1
            if not left:
                return
        for offset in pending:
            if chunk[offset >> bits & mask] == UNRESOLVED:
                chunk[offset >> bits & mask] = self._rest

    def _entry_of(self, answer: int, depth: int, guest_offset: int) -> int:
        """The entry for what the layer `depth` answered for a granule, unless that is INDIRECT.

        Raises:
            NotCached: It answered NOT_CACHED.
        """
        if answer >= 0:
            in_place = answer & IN_PLACE if depth == 0 else 0
            number = self._numbers[depth][answer & STORAGE_MASK]
            return answer & HOST_OFFSET_MASK | in_place | number
        if answer == base.ZERO:
            return ZERO
        if answer == base.SPECIAL:
            return depth << 9 | SPECIAL
        if answer == base.NOT_CACHED:
            raise NotCached(self.layers[depth], guest_offset)
        return MIXED

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


def _beyond(layer: FormatDriver, guest_offset: int) -> int:
    """The entry of a granule that ends behind the end of `layer`, one below the top."""
    # The end of a shorter lower layer reads as zeroes.
    return ZERO if guest_offset >= layer.size() else MIXED


def _run(entry: int, start: int, end: int, granule: int) -> Run:
    """The run from `start` to `end`, whose first granule has `entry`."""
    code = entry & STORAGE_MASK
    if code < _FIRST_CODE:
        return Run(code, (entry & HOST_OFFSET_MASK) + (start & granule - 1), end - start)
    return Run(code, entry >> 9, end - start)
