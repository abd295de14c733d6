"""Random walks: 200 of what `python -m tests.trust.walk` does, on every processor."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = int(os.environ.get("IMAGOFS_WALKS", "200"))
SEED = int(os.environ.get("IMAGOFS_WALK_SEED", "0")) or random.randrange(1, 1 << 30)


@pytest.mark.timeout(300)
def test_random_walks(tmp_path: Path) -> None:
    parts = min(os.cpu_count() or 1, 8)
    walks = []
    for part in range(parts):
        first, last = RUNS * part // parts, RUNS * (part + 1) // parts
        words = ["--runs", str(last - first), "--seed", str(SEED + first)]
        walks.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.trust.walk", *words],
                cwd=Path(__file__).parents[2],
                env={**os.environ, "TMPDIR": str(tmp_path)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        reports = [walk.communicate()[0] for walk in walks]
    finally:
        for walk in walks:
            walk.kill()
    print(f"seeds from {SEED} on\n{''.join(reports)}")
    assert [walk.returncode for walk in walks] == [0] * parts, "\n".join(reports)
