"""The mount: start, reads and writes as programs do them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.mount.mounting import mounting

MIB = 1 << 20


@pytest.mark.parametrize("kind", ["flat", "chain"])
def bench_start_and_unmount(
    benchmark, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    image = request.getfixturevalue(kind)

    def start_and_unmount() -> None:
        with mounting(tmp_path) as mount:
            point = tmp_path / "file"
            point.touch()
            mount(image, at=point).umount()

    benchmark.pedantic(start_and_unmount, rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("length", [4096, MIB])
def bench_read(benchmark, length: int, flat: Path, tmp_path: Path) -> None:
    """O_DIRECT, so that the kernel asks each time."""
    import mmap

    with mounting(tmp_path) as mount:
        file = os.open(mount(flat).file, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, length)
        try:
            os.preadv(file, [buffer], 0)
            assert benchmark(os.preadv, file, [buffer], 0) == length
        finally:
            os.close(file)
            buffer.close()
