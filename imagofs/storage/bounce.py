"""Requests of any alignment, on storages that demand one.

A request that fits goes to the driver as it is. Others pass through an aligned buffer of at most
1 MiB. A write that begins or ends within a block reads that block first; a strong write blocker
keeps every other write away from its blocks meanwhile, and aligned writes hold weak ones.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..vectors import is_address_aligned, split_views, total_length, views_aligned

if TYPE_CHECKING:
    from .base import Storage

__all__ = ["aligned_buffer", "readv", "writev"]

_CHUNK = 1 << 20


def aligned_buffer(length: int, alignment: int) -> memoryview:
    """A writable buffer of `length` zero bytes (above zero) at a multiple of `alignment` bytes."""
    spare = max(0, alignment - mmap.PAGESIZE)
    view = memoryview(mmap.mmap(-1, length + spare, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    if not spare:
        return view
    for start in range(0, alignment, mmap.PAGESIZE):
        if is_address_aligned(view[start : start + 1], alignment):
            return view[start : start + length]
    raise ValueError(f"no address is a multiple of {alignment}")


async def readv(storage: Storage, views: Sequence[memoryview], offset: int) -> None:
    """`Storage.readv`, with its checks done."""
    request, memory = storage.request_alignment, storage.memory_alignment
    end = offset + total_length(views)
    if end == offset:
        return
    if offset % request == 0 and views_aligned(views, memory, request):
        await storage.pure_readv(views, offset)
        return
    first, last = offset - offset % request, end + -end % request
    chunk = _chunk_length(first, last, request)
    bounce = aligned_buffer(chunk, memory)
    rest = list(views)
    for start in range(first, last, chunk):
        stop = min(start + chunk, last)
        await storage.pure_readv([bounce[: stop - start]], start)
        position = max(start, offset) - start
        wanted, rest = split_views(rest, min(stop, end) - start - position)
        for view in wanted:
            view[:] = bounce[position : position + view.nbytes]
            position += view.nbytes


async def writev(storage: Storage, views: Sequence[memoryview], offset: int) -> None:
    """`Storage.writev`, with its checks done."""
    request, memory = storage.request_alignment, storage.memory_alignment
    end = offset + total_length(views)
    if end == offset:
        return
    first, last = offset - offset % request, end + -end % request
    if first < offset or end < last:
        async with storage.write_blockers().strong(first, last):
            await _write_through_buffer(storage, views, offset, end)
    elif request == 1:
        await _write_through_buffer(storage, views, offset, end)
    else:
        async with storage.write_blockers().weak(first, last):
            if views_aligned(views, memory, request):
                await storage.pure_writev(views, offset)
            else:
                await _write_through_buffer(storage, views, offset, end)


async def _write_through_buffer(
    storage: Storage, views: Sequence[memoryview], offset: int, end: int
) -> None:
    """Write `views`, and around them what the blocks at both edges hold already."""
    request, memory = storage.request_alignment, storage.memory_alignment
    first, last = offset - offset % request, end + -end % request
    chunk = _chunk_length(first, last, request)
    bounce = aligned_buffer(chunk, memory)
    block = aligned_buffer(request, memory) if first < offset or end < last else bounce[:0]
    rest = list(views)
    for start in range(first, last, chunk):
        stop = min(start + chunk, last)
        position = max(start, offset) - start
        used = min(stop, end) - start
        if position:
            await storage.pure_readv([block], start)
            bounce[:request] = block
        length = stop - start
        if used < length:
            if end < storage.size():
                if length > request or not position:  # else it is the block that was read above
                    await storage.pure_readv([block], stop - request)
                used_in_block = used - (length - request)
                bounce[used:length] = block[used_in_block:]
            # Growth within these blocks is kept off by the blocker, so the size may be asked here;
            # growth behind them leaves what is not written here as a hole, which reads as zero.
            length = min(length, max(used, storage.size() - start))
        source, rest = split_views(rest, used - position)
        for view in source:
            bounce[position : position + view.nbytes] = view
            position += view.nbytes
        await storage.pure_writev([bounce[:length]], start)


def _chunk_length(first: int, last: int, request: int) -> int:
    """Bytes to transfer at once: a multiple of `request`."""
    return min(last - first, max(request, _CHUNK - _CHUNK % request))
