"""Random walks: a sample of what `python -m tests.trust.walk` does."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.trust import walk

RUNS = int(os.environ.get("IMAGOFS_WALKS", "60"))
SEED = int(os.environ.get("IMAGOFS_WALK_SEED", "0")) or random.randrange(1, 1 << 30)
PARTS = 6


@pytest.mark.parametrize("part", range(PARTS))
def test_random_walks(part: int, tmp_path: Path) -> None:
    for number in range(part, RUNS, PARTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        print(f"seed {SEED + number}")
        walk.run(SEED + number, folder)
