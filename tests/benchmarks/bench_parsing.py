"""Parsing: header, L2 tables, refcount blocks."""

from __future__ import annotations

from pathlib import Path

from imagofs.format.qcow2.entries import from_big_endian, pack_refcounts, unpack_refcounts
from imagofs.format.qcow2.header import parse_header


def bench_header(benchmark, flat: Path) -> None:
    data = flat.read_bytes()[:65536]
    assert benchmark(parse_header, data).size


def bench_l2_slice(benchmark) -> None:
    assert len(benchmark(from_big_endian, bytes(4096))) == 512


def bench_refcount_block_16_bits(benchmark) -> None:
    assert len(benchmark(unpack_refcounts, bytes(65536), 16)) == 32768


def bench_refcount_block_1_bit_there_and_back(benchmark) -> None:
    data = bytes(range(256)) * 16
    assert benchmark(lambda: pack_refcounts(unpack_refcounts(data, 1), 1)) == data
