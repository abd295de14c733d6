"""Looking up where bytes are: cached, missed, through a chain."""

from __future__ import annotations

import random
from pathlib import Path

import trio

from imagofs import FormatAccess


def _fill(image: FormatAccess) -> None:
    trio.run(image.read, bytearray(image.size()), 0)


def bench_cached(benchmark, flat: Path, opened) -> None:
    image = opened(flat)
    _fill(image)
    lookup = image._map.entry
    assert benchmark(lookup, 5 << 20) >= 0


def bench_cached_in_a_chain_of_32(benchmark, chain: Path, opened) -> None:
    image = opened(chain)
    _fill(image)
    lookup = image._map.entry
    assert benchmark(lookup, 5 << 20) >= 0


def _resolve_anew(image: FormatAccess) -> None:
    image._map.forget(0, image.size())
    image._map.runs(0, image.size())


def bench_resolving_1024_clusters(benchmark, flat: Path, opened) -> None:
    image = opened(flat)
    _fill(image)
    benchmark(_resolve_anew, image)


def bench_resolving_1024_clusters_in_a_chain_of_32(benchmark, chain: Path, opened) -> None:
    image = opened(chain)
    _fill(image)
    benchmark(_resolve_anew, image)


def bench_missed_tables(benchmark, flat: Path, opened) -> None:
    """The tables come from the page cache each time."""
    image = opened(flat)
    offsets = [random.Random(1).randrange(image.size()) for _ in range(64)]

    async def lookups() -> None:
        for offset in offsets:
            image.driver.metadata.l2.cache.drop_namespace(image.driver.metadata.l2.namespace)
            await image.get_mapping(offset, 1)

    benchmark(trio.run, lookups)
