"""Fixtures of the mount tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.mounting import Mounted, MountImage, mounting


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[MountImage]:
    """`mount(image, *options)`: mounts an image with the data channel; cleans up afterwards."""
    with mounting(tmp_path) as mount_image:
        yield mount_image


@pytest.fixture(params=["on", "off"], ids=["channel", "plain"])
def both(request: pytest.FixtureRequest, mount: MountImage) -> Callable[..., Mounted]:
    """As `mount`, once with the data channel and once without."""

    def mount_image(image: Path, *options: str, at: Path | None = None) -> Mounted:
        return mount(image, f"channel={request.param}", *options, at=at)

    return mount_image


def random_bytes(length: int, seed: int = 1) -> bytes:
    """The same bytes each time, none of them alike from sector to sector."""
    return random.Random(seed).randbytes(length)


@pytest.fixture
def raw_image(tmp_path: Path) -> Path:
    """A raw image of 8 MiB and 100 bytes, full of data."""
    path = tmp_path / "disk.img"
    path.write_bytes(random_bytes((8 << 20) + 100))
    return path
