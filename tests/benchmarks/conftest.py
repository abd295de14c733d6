"""Fixtures of the benchmarks. They are not part of `make test`: see `make bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from imagofs import FormatAccess, PermissiveImplicitOpenGate, open_image
from tests import qemu

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fully allocated qcow2 of 64 MiB."""
    folder = tmp_path_factory.mktemp("flat")
    return qemu.create(folder / "flat.qcow2", SIZE, writes=[f"write -P 3 0 {SIZE}"])


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of 32 overlays of a flat base, each with some clusters of its own."""
    folder = tmp_path_factory.mktemp("chain")
    below = qemu.create(folder / "layer0.qcow2", SIZE, writes=[f"write -P 3 0 {SIZE}"])
    for layer in range(1, 33):
        below = qemu.create(
            folder / f"layer{layer}.qcow2",
            backing=below.name,
            writes=[f"write -P {layer} {layer * 31 % 1024 * 65536} 64k"],
        )
    return below


@pytest.fixture
def opened() -> Iterator[Callable[..., FormatAccess]]:
    """`opened(path, writable=...)`: an open image; closed at the end without an error."""
    images: list[FormatAccess] = []

    def open_it(path: Path, *, writable: bool = False) -> FormatAccess:
        async def open_in_loop() -> FormatAccess:
            return await open_image(path, writable=writable, gate=PermissiveImplicitOpenGate())

        images.append(trio.run(open_in_loop))
        return images[-1]

    yield open_it
    for image in images:
        trio.run(image.close)
