"""What is shown of every kind of image is what qemu-img shows: contents, facts, and the map."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests import qemu
from tests.mount.matrix import MATRIX
from tests.mount.mounting import MountImage, imagofs
from tests.support.qemu_map import map_like_qemu


def test_the_matrix_is_large_enough() -> None:
    assert len(MATRIX) >= 60


@pytest.mark.parametrize("name", MATRIX)
def test_reads_as_qemu_img_converts(name: str, tmp_path: Path, mount: MountImage) -> None:
    image, fmt = MATRIX[name](tmp_path)
    before = image.read_bytes()
    expected = qemu.contents(image, fmt)
    facts = qemu.info(image, fmt)

    ours = json.loads(imagofs("info", "--json", image).stdout)
    for key in (
        "virtual-size",
        "format",
        "cluster-size",
        "backing-filename",
        "backing-filename-format",
        "full-backing-filename",
        "dirty-flag",
    ):
        if key == "virtual-size" and facts[key] % 512 == 0:
            # qemu rounds a raw file's size up to sectors; the true one is shown here.
            assert -(-ours[key] // 512) * 512 == facts[key]
        else:
            assert ours.get(key) == facts.get(key), key
    size = ours["virtual-size"]
    map_like_qemu("-f", fmt, image, size=size if size % 512 else None)

    mounted = mount(image)
    shown = mounted.file.read_bytes()
    assert len(shown) == ours["virtual-size"] == mounted.file.stat().st_size
    if len(shown) == len(expected):
        assert hashlib.md5(shown).hexdigest() == hashlib.md5(expected).hexdigest()
    else:
        assert shown == expected[: len(shown)] and not any(expected[len(shown) :])
    mounted.umount()
    assert image.read_bytes() == before
