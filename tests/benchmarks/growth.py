#!/usr/bin/env python3
"""How cost grows: a chain against a flat image, large sparse images, many readers, start, memory.

    tests/benchmarks/growth.py [--imagofs CMD] [--pairs N] [--seconds S] [--work DIR]

Prints one line per question: the figure, and a ratio of paired runs where two are compared. The
images are those of compare.py, made once in the same folder, and some of its own.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from tests import qemu
from tests.benchmarks import compare
from tests.mount.mounting import Mounted

READS = {
    "random read 4k, depth 1": "--rw=randread --bs=4k --ioengine=psync --direct=1",
    "random read 4k, depth 32": "--rw=randread --bs=4k --ioengine=libaio --iodepth=32 --direct=1",
    "sequential read 1M": "--rw=read --bs=1M --ioengine=psync --direct=1",
}


def resident_mib(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


class Mount:
    """One mount over a regular file."""

    def __init__(self, command: list[str], image: Path, folder: Path) -> None:
        self.point = folder / f"{image.stem}.mount"
        self.point.touch()
        start = time.perf_counter()
        subprocess.run([*command, str(image), str(self.point)], check=True)
        self.point.open("rb").read(512)
        self.seconds = time.perf_counter() - start
        self.mounted = Mounted(self.point, self.point)

    def stop(self) -> None:
        subprocess.run([compare.OWN, "umount", str(self.point)], check=True)
        self.mounted.clean_up()


def make(work: Path) -> dict[str, Path]:
    """The images that compare.py does not have."""
    images = {}
    sparse = work / "sparse-1T.qcow2"
    if not sparse.exists():
        step = (1 << 40) // 2048
        commands = [f"write -P 5 {number * step} 64k" for number in range(2048)]
        qemu.create(sparse, 1 << 40)
        for first in range(0, len(commands), 256):
            qemu.qemu_io(sparse, *commands[first : first + 256])
    images["sparse"] = sparse
    deep = work / "deep"
    top = deep / "layer100.qcow2"
    if not top.exists():
        deep.mkdir(exist_ok=True)
        shutil.copy(work / "flat.qcow2", deep / "layer0.qcow2")
        for layer in range(1, 101):
            qemu.create(deep / f"layer{layer}.qcow2", backing=f"layer{layer - 1}.qcow2")
    images["deep"] = top
    huge = work / "huge-16T.qcow2"
    if not huge.exists():
        qemu.create(huge, 16 << 40)
    images["huge"] = huge
    return images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imagofs", type=shlex.split, default=[compare.OWN])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/imagofs-bench"))
    args = parser.parse_args()
    images = compare.make_images(args.work)
    own = make(args.work)
    scratch = args.work / "growth"
    compare.clear(scratch)
    scratch.mkdir()
    size = images["flat"][1]

    flat = Mount(args.imagofs, images["flat"][0], scratch)
    others = {
        "chain of 32": Mount(args.imagofs, images["chain32"][0], scratch),
        "chain of 100": Mount(args.imagofs, own["deep"], scratch),
    }
    for name, other in others.items():
        files = compare.layers(images["chain32"][0] if "32" in name else own["deep"])
        for label, job in READS.items():
            row = compare.Row(label, "", job)
            ratios = []
            for turn in range(args.pairs):
                figures = {}
                for mount in (flat, other) if turn % 2 else (other, flat):
                    compare.warm(images["flat"][0], *files)
                    figures[mount] = compare.fio(row, mount.point, size, args.seconds)
                ratios.append(figures[other] / figures[flat])
            print(f"{name} / flat, {label}: {statistics.median(ratios):.2f}", flush=True)
    print(f"resident after it: {resident_mib(others['chain of 100'].mounted.pid):.0f} MiB")

    many = compare.Row("64 readers", "", f"{READS['random read 4k, depth 1']} --numjobs=64")
    many = compare.Row("", "", many.fio + " --group_reporting")
    print(f"64 readers: {compare.fio(many, flat.point, size, args.seconds):,.0f} IOPS")
    sparse = Mount(args.imagofs, own["sparse"], scratch)
    row = compare.Row("", "", READS["random read 4k, depth 1"])
    compare.warm(own["sparse"])
    iops = compare.fio(row, sparse.point, 1 << 40, args.seconds)
    print(f"random read 4k over 1 TiB, sparse: {iops:,.0f} IOPS")
    print(f"resident after it: {resident_mib(sparse.mounted.pid):.0f} MiB")
    for mount in (flat, sparse, *others.values()):
        mount.stop()

    for name, image in (
        ("flat", images["flat"][0]),
        ("chain of 32", images["chain32"][0]),
        ("16 TiB", own["huge"]),
    ):
        seconds = []
        resident = 0.0
        for _ in range(args.pairs):
            mount = Mount(args.imagofs, image, scratch)
            seconds.append(mount.seconds)
            resident = resident_mib(mount.mounted.pid)
            mount.stop()
        print(
            f"start, {name}: {statistics.median(seconds):.3f} s; idle: {resident:.0f} MiB resident"
        )
    compare.clear(scratch)


if __name__ == "__main__":
    main()
