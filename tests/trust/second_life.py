"""What a power cut left is written to again, as it is, until the next power cut.

Nobody repairs an image that has nothing worse than leaks. What an interrupted operation left behind
(host clusters that nothing refers to, data that was never mapped) must do no harm later on.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from tests.support.qcow2_oracle import check, read_disk
from tests.trust import crash
from tests.trust.history import History, run_repeatably

_OPERATIONS = 60
_MOMENTS = 2  # at which the power is cut again
_IMAGES = 3  # for each of them


def live_again(
    shape: crash.Shape,
    files: crash.Files,
    image: bytearray,
    data: bytearray | None,
    seed: int,
    folder: Path,
) -> None:
    """Run another workload on a crash image, judge what is left of it, and of power cuts in it.

    Args:
        shape: What the image was made like.
        files: What it was made of.
        image: The crash image.
        data: Its data file, if it has one.
        seed: Of the workload and of the power cuts.
        folder: For files.

    Raises:
        Broken: Something is worse than it was.
    """
    again = replace(files, image=bytes(image), data=None if data is None else bytes(data))
    disk = read_disk(image, data=data, backing=files.backing)
    shape = replace(shape, size=len(disk), operations=_OPERATIONS)
    leaked = len(check(image).leaked)
    with shape.slices():
        trace = run_repeatably(crash.run_workload, shape, again, seed, seed=seed)
    changes = [record for record in trace.log.records if record.kind != "sync"]
    end, end_data = crash.build(again, changes)
    try:
        left = crash.judge(
            again, end, end_data, *_allowed(trace.history, again, float("inf"), powered=True)
        )
        if left > leaked:
            raise crash.Broken(f"{left} clusters are leaked, {leaked} were before")
        crash.judge_by_qemu(end, folder)
        rnd = random.Random(seed)
        moments = list(crash.cuts(trace))
        for cut in rnd.sample(moments, min(_MOMENTS, len(moments))):
            allowed = _allowed(trace.history, again, cut.at, powered=False)
            for chosen in crash.subsets(cut, rnd, _IMAGES):
                records = sorted([*cut.durable, *chosen], key=lambda record: record.began)
                crash.judge(again, *crash.build(again, records), *allowed)
    except crash.Broken as error:
        raise crash.Broken(f"in a second life, seed {seed}: {error}") from None


def _allowed(
    history: History, files: crash.Files, at: float, *, powered: bool
) -> tuple[list[set[bytes]], list[set[bytes]]]:
    """What the guest's sectors may hold at the time `at`, and what a raw data file may.

    A raw data file may have what was never mapped, until something is written there; or what the
    guest finds.
    """
    allowed = history.allowed(at, powered=powered)
    if not files.raw or files.data is None:
        return allowed, allowed
    of_file = replace(history, initial=files.data).allowed(at, powered=powered)
    return allowed, [guests | own for guests, own in zip(allowed, of_file, strict=True)]
