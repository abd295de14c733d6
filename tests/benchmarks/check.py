#!/usr/bin/env python3
"""Time and peak memory of `imagofs check` beside `qemu-img check`, on a full qcow2 of 1 TiB.

    tests/benchmarks/check.py [--imagofs CMD] [--pairs N] [--size SIZE] [--work DIR]

The image has all its metadata and no data. Each pair runs every program once, in turn; a ratio is
the median over the pairs. A ratio below 1 is imagofs ahead. The peers are the qemu-img on PATH and,
where setup_peer.sh made its tree, the newest one too.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from tests import qemu
from tests.benchmarks.compare import OWN, PEER_TREE


class Run(NamedTuple):
    """What one run of a check took."""

    seconds: float
    peak_mib: float


def measure(command: list[str]) -> Run:
    """Run a check to its end; it must find nothing."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise AssertionError(f"{shlex.join(command)}: exit code {child.returncode}")
    return Run(time.perf_counter() - start, usage.ru_maxrss / 1024)


def peers() -> dict[str, list[str]]:
    """The commands of the qemu-img that there are, by their versions."""
    found = [["qemu-img"]]
    program = PEER_TREE / "usr/bin/qemu-img"
    if program.exists():
        loader = PEER_TREE / "lib64/ld-linux-x86-64.so.2"
        libraries = PEER_TREE / "usr/lib/x86_64-linux-gnu"
        found.append([str(loader), "--library-path", str(libraries), str(program)])
    return {
        " ".join(qemu.run(*words, "--version").split()[:3]): [*words, "check", "-q"]
        for words in found
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imagofs", type=shlex.split, default=[OWN])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", default="1T")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/imagofs-bench"))
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    image = args.work / f"full-{args.size}.qcow2"
    if not image.exists():
        qemu.create(image, args.size, preallocation="metadata")
    commands = {"imagofs": [*args.imagofs, "check", "--json"], **peers()}
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(args.pairs):
        for name in list(commands)[:: -1 if turn % 2 else 1]:
            runs[name].append(measure([*commands[name], str(image)]))
    ours = runs["imagofs"]
    for name, theirs in runs.items():
        line = (
            f"{name}: {statistics.median(run.seconds for run in theirs):.2f} s, "
            f"{max(run.peak_mib for run in theirs):.0f} MiB"
        )
        if name != "imagofs":
            pairs = list(zip(ours, theirs, strict=True))
            times = statistics.median(mine.seconds / other.seconds for mine, other in pairs)
            peaks = statistics.median(mine.peak_mib / other.peak_mib for mine, other in pairs)
            line += f"; imagofs takes {times:.2f} of the time, {peaks:.2f} of the memory"
        print(line, flush=True)


if __name__ == "__main__":
    main()
