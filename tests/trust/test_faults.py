"""Faults: a sample of what `make faults` tries."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.trust import crash, faults, full_disk

SEED = int(os.environ.get("IMAGOFS_FAULTS_SEED", "0")) or random.randrange(1, 1 << 20)


@pytest.mark.parametrize("shape", faults.SHAPES, ids=lambda shape: shape.name)
def test_calls_that_fail(shape: crash.Shape, tmp_path: Path) -> None:
    tally = faults.try_shape(shape, SEED, tmp_path, limit=8)
    print(f"IMAGOFS_FAULTS_SEED={SEED}: {tally}")
    assert not tally.broken, "\n".join(tally.broken)
    assert tally.faults == 8
    assert tally.kinds["none"] == 0


@pytest.mark.parametrize("kind", full_disk.KINDS[1:3], ids=lambda kind: kind.name)
def test_full_disk(kind: full_disk.Kind, tmp_path: Path) -> None:
    """There is room again after a while."""
    count = full_disk.try_kind(kind, SEED, tmp_path)
    print(f"IMAGOFS_FAULTS_SEED={SEED}: {count}")
    assert count.failed_writes + count.failed_syncs


def test_readers_of_a_full_disk(tmp_path: Path) -> None:
    """Tables that do not fit are told to who wrote or syncs, not to who closes what it read."""
    with_a_failing_sync = 20261204
    kind = next(kind for kind in full_disk.KINDS if kind.name == "qcow2, 512")
    assert full_disk.try_kind(kind, with_a_failing_sync, tmp_path).failed_syncs


def test_killed_on_a_full_disk(tmp_path: Path) -> None:
    assert full_disk.try_kill(full_disk.KINDS[0], SEED, tmp_path).failed_writes
