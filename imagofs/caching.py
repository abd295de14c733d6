"""A bounded cache of metadata tables, shared by all layers of a chain.

Two generations instead of a list in order of use: a hit costs one dictionary lookup and moves
nothing. What is asked for is in `young`, or is moved there from `old`; when `young` has grown to
half the limit it becomes `old`, and what nobody asked for meanwhile is forgotten.
"""

from __future__ import annotations

from array import array
from itertools import count

__all__ = ["DEFAULT_METADATA_BYTES", "MetadataCache", "Table"]

Table = array  # of unsigned integers, in the machine's byte order

DEFAULT_METADATA_BYTES = 32 << 20

_ENTRY_OVERHEAD = 200  # bytes: the array's object, the key, two dictionary slots
_NAMESPACE_BITS = 48


class MetadataCache:
    """Tables by integer key, up to `limit` bytes.

    Args:
        limit: Bytes of tables that are kept, both generations together.
    """

    __slots__ = ("_namespaces", "_old", "_young_bytes", "half", "young")

    def __init__(self, limit: int = DEFAULT_METADATA_BYTES) -> None:
        self.half = max(limit // 2, 1 << 16)
        #: The fast path looks here by itself, and calls `get` if it finds nothing.
        self.young: dict[int, array[int]] = {}
        self._old: dict[int, array[int]] = {}
        self._young_bytes = 0
        self._namespaces = count()

    def hold_at_least(self, length: int) -> None:
        """Raise the limit, if it is lower, so that tables of `length` bytes can be there together.

        Who needs several tables at a time would otherwise load them in turns without end.
        """
        self.half = max(self.half, length)

    def namespace(self) -> int:
        """A number to add to own keys (0 to 2**48 - 1), so that they differ from others'."""
        return next(self._namespaces) << _NAMESPACE_BITS

    def get(self, key: int) -> array[int] | None:
        """The table at `key`, None if it is not cached."""
        table = self.young.get(key)
        if table is None:
            table = self._old.pop(key, None)
            if table is not None:
                self.put(key, table)
        return table

    def put(self, key: int, table: array[int]) -> None:
        """Keep `table` at `key`."""
        self.young[key] = table
        self._young_bytes += len(table) * table.itemsize + _ENTRY_OVERHEAD
        if self._young_bytes > self.half:
            # The newest table moves along: it is about to be used.
            self._old, self.young = self.young, {key: table}
            self._young_bytes = len(table) * table.itemsize + _ENTRY_OVERHEAD

    def drop(self, key: int) -> None:
        """Forget the table at `key`."""
        self.young.pop(key, None)
        self._old.pop(key, None)

    def clear(self) -> None:
        """Forget every table."""
        self.young, self._old, self._young_bytes = {}, {}, 0

    def drop_namespace(self, namespace: int) -> None:
        """Forget every table of one namespace."""
        for generation in (self.young, self._old):
            for key in [
                key for key in generation if key >> _NAMESPACE_BITS << _NAMESPACE_BITS == namespace
            ]:
                del generation[key]
