"""The crash rule: a sample of what `make crash` tries, and that the judge is awake."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import trio

from tests.support.qcow2_oracle import Layout, check, read_disk
from tests.trust import crash
from tests.trust.history import SECTOR, tagged

IMAGES = int(os.environ.get("IMAGOFS_CRASH_IMAGES", "5000"))
SEED = int(os.environ.get("IMAGOFS_CRASH_SEED", "0")) or random.randrange(1, 1 << 20)


@pytest.mark.parametrize("shape", crash.SHAPES, ids=lambda shape: shape.name)
def test_power_cuts_leave_nothing_worse_than_leaks(shape: crash.Shape, tmp_path: Path) -> None:
    tally = crash.try_shape(shape, SEED, tmp_path, IMAGES // len(crash.SHAPES) + 1)
    print(f"IMAGOFS_CRASH_SEED={SEED}: {tally}")
    assert not tally.broken, "\n".join(tally.broken)
    assert tally.images


SMALL = crash.SHAPES[0]


@pytest.fixture
def trace(tmp_path: Path) -> crash.Trace:
    return trio.run(crash.run_workload, SMALL, crash.make(SMALL, tmp_path), 1)


def test_the_judge_sees_a_lost_refcount(trace: crash.Trace) -> None:
    changes = [record for record in trace.log.records if record.kind != "sync"]
    image, _ = crash.build(trace.files, changes)
    allowed = trace.history.allowed(powered=True)
    assert crash.judge(trace.files, image, None, allowed) == 0
    layout = Layout(image)
    block = layout.words(layout.table_offset, 1)[0]
    [used] = [number for number in layout.refcounts() if number == layout.l1_offset >> 9]
    image[block + 2 * used : block + 2 * used + 2] = b"\0\0"
    with pytest.raises(crash.Broken, match="refcount 0, 1 references"):
        crash.judge(trace.files, image, None, allowed)


def test_the_judge_sees_a_sector_that_is_lost_or_misplaced(trace: crash.Trace) -> None:
    image, _ = crash.build(trace.files, [r for r in trace.log.records if r.kind != "sync"])
    allowed = trace.history.allowed(powered=True)
    disk = read_disk(image)
    sector = next(s for s in range(len(allowed)) if any(disk[s * SECTOR : (s + 1) * SECTOR]))
    contents = bytes(disk[sector * SECTOR : (sector + 1) * SECTOR])
    for other in (bytes(SECTOR), tagged(sector + 1, 10), crash.GARBAGE):
        changed = image.replace(contents, other)
        assert not check(changed).errors
        with pytest.raises(crash.Broken, match=f"guest sector {sector} holds"):
            crash.judge(trace.files, changed, None, allowed)
