"""`imagofs map --json` beside `qemu-img map --output=json`."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from imagofs.cli import main
from tests import qemu

__all__ = ["map_like_qemu", "our_map"]


def our_map(*words: str | Path) -> list[dict[str, Any]]:
    """What `imagofs map --json WORDS...` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(["map", "--json", *map(str, words)]) == 0
    found: list[dict[str, Any]] = json.loads(output.getvalue())
    return found


def map_like_qemu(*words: str | Path, size: int | None = None) -> list[dict[str, Any]]:
    """The same, once it was seen to be what qemu-img prints, but for keys that only newer ones add.

    Args:
        words: Options that both have, and the image.
        size: The disk's, in bytes, where that is no multiple of 512: qemu-img rounds it up.

    Raises:
        AssertionError: They differ.
    """
    found = our_map(*words)
    expected = json.loads(qemu.qemu_img("map", "--output=json", *words))
    if size is not None:
        last = expected[-1]
        assert last["start"] < size <= last["start"] + last["length"] < size + 512
        last["length"] = size - last["start"]
    known = {*expected[0], "offset"}
    assert [{key: entry[key] for key in entry if key in known} for entry in found] == expected
    return found
