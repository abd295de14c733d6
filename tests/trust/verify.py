"""fio verifies what it wrote amid trims and zeroes: four jobs at depth 32 over a mount (as root).

Two jobs trim and write, two read and write, all at random and with checksums
(`--verify=crc32c`), while blocks that were written a moment ago are verified already; at the end
all is read back. fio trims block devices only, so the jobs work on a loop device on the mount,
which passes trims on as FALLOC_FL_PUNCH_HOLE. Meanwhile a fifth writer punches, zeroes, writes and
reads a part of its own through the mount, and compares each read with a model.

    python -m tests.trust.verify --megabytes 128 --seed 1
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import re
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from imagofs.storage import syscalls
from tests import qemu
from tests.mount.mounting import mounting

M = 1 << 20
_BLOCK = 4096

#: `qemu-img create` options of the images, by name.
IMAGES: dict[str, dict[str, str | int | bool]] = {
    "64k": {},
    "4k": {"cluster_size": 4096},
    "512": {"cluster_size": 512},
    "subclusters": {"extended_l2": True, "cluster_size": "128k"},
    "refcounts of one bit": {"refcount_bits": 1, "cluster_size": "16k"},
    "data file": {"data_file": "data", "cluster_size": "32k"},
}


@dataclass(slots=True)
class Verified:
    """What came of one image.

    Attributes:
        reads, writes, trims: What fio did, verifying reads included.
        others: What the fifth writer did.
        mismatches: How often something else was found than was written.
    """

    reads: int = 0
    writes: int = 0
    trims: int = 0
    others: int = 0
    mismatches: int = 0

    def add(self, other: Verified) -> None:
        """Add another one's."""
        self.reads += other.reads
        self.writes += other.writes
        self.trims += other.trims
        self.others += other.others
        self.mismatches += other.mismatches

    def __str__(self) -> str:
        return (
            f"fio: {self.reads} reads, {self.writes} writes, {self.trims} trims; {self.others} "
            f"other operations; {self.mismatches} mismatches"
        )


def fio_command(device: str, part: int, seed: int) -> list[str]:
    """Four jobs, each with `part` bytes of the device to itself."""
    command = [
        "fio", f"--filename={device}", "--ioengine=libaio", "--direct=1", "--iodepth=32",
        f"--size={part}", f"--io_size={part}", "--verify=crc32c", "--verify_fatal=1",
        "--do_verify=1", f"--randseed={seed}", "--verify_backlog=256", "--group_reporting",
        "--verify_state_save=0",  # else files of fio's stay in the working directory
    ]  # fmt: skip
    for number, (way, sizes) in enumerate(
        (
            ("randtrimwrite", "--bs=4k"),
            ("randrw", "--bssplit=4k/60:16k/30:64k/10"),
            ("randtrimwrite", "--bs=16k"),
            ("randrw", "--bs=4k"),
        )
    ):
        command += [f"--name=job{number}", f"--offset={number * part}", f"--rw={way}", sizes]
    return command


class Fifth:
    """Punches, zeroes, writes and reads a part of the disk, past the page cache."""

    def __init__(self, file: Path, start: int, length: int, seed: int) -> None:
        self.fd = os.open(file, os.O_RDWR | os.O_DIRECT)
        self.start, self.model = start, bytearray(length)
        self.buffer = mmap.mmap(-1, 64 * _BLOCK)
        self.rnd = random.Random(seed)
        self.operations = self.mismatches = 0
        self.stop = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Until `stop` is set. For a thread."""
        try:
            while not self.stop.is_set():
                self._step()
        except BaseException as error:
            self.error = error
        finally:
            os.close(self.fd)

    def _step(self) -> None:
        rnd = self.rnd
        length = rnd.randrange(1, 65) * _BLOCK
        at = rnd.randrange((len(self.model) - length) // _BLOCK + 1) * _BLOCK
        what = rnd.choice(["read", "write", "punch", "zero", "sync"])
        place, view = self.start + at, memoryview(self.buffer)[:length]
        self.operations += 1
        if what == "read":
            assert os.preadv(self.fd, [view], place) == length
            self.mismatches += view != self.model[at : at + length]
        elif what == "write":
            view[:] = rnd.randbytes(length)
            assert os.pwritev(self.fd, [view], place) == length
            self.model[at : at + length] = view
        elif what == "sync":
            os.fsync(self.fd)
        else:
            call = syscalls.punch_hole if what == "punch" else syscalls.zero_range
            call(self.fd, place, length)
            self.model[at : at + length] = bytes(length)


def verify(name: str, part: int, seed: int, folder: Path) -> Verified:
    """Have fio verify one image.

    Args:
        name: A key of `IMAGES`.
        part: Bytes of each job's part.
        seed: Of fio and of the fifth writer.
        folder: For files; empty.

    Raises:
        AssertionError: fio failed, the image is not clean, or the disk is not what it was.
    """
    options = dict(IMAGES[name])
    if "data_file" in options:
        options["data_file"] = str(folder / "data")
    image = qemu.create(folder / "image.qcow2", 5 * part, **options)  # type: ignore[arg-type]
    with mounting(folder) as mount:
        mounted = mount(image, "rw")
        fifth = Fifth(mounted.file, 4 * part, part, seed)
        worker = threading.Thread(target=fifth.run)
        device = qemu.run("losetup", "-f", "--show", "--direct-io=on", mounted.file).strip()
        worker.start()
        try:
            report = qemu.run(*fio_command(device, part, seed), timeout=1800)
        finally:
            fifth.stop.set()
            worker.join()
            qemu.run("losetup", "-d", device)
        if fifth.error is not None:
            raise fifth.error
        found = mounted.file.read_bytes()
        # A loop device lets go a moment after losetup has returned.
        for _ in range(100):
            if not _is_used(device):
                break
            time.sleep(0.05)
        mounted.umount()
    qemu.check(image)
    assert found[4 * part :] == fifth.model
    assert qemu.contents(image) == found
    totals = [
        re.search(r"issued rwts: total=(\d+),(\d+),(\d+)", line) for line in report.split("\n")
    ]
    reads, writes, trims = (
        sum(int(total[number]) for total in totals if total) for number in (1, 2, 3)
    )
    return Verified(reads, writes, trims, fifth.operations, fifth.mismatches)


def _is_used(device: str) -> bool:
    return Path("/sys/block", Path(device).name, "loop").exists()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Let fio verify mounts amid trims and zeroes.")
    parser.add_argument("--megabytes", type=int, default=128, help="of each job")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    total = Verified()
    failed = 0
    for name in IMAGES:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="imagofs-verify-", dir="/var/tmp") as folder:
            try:
                verified = verify(name, arguments.megabytes * M, arguments.seed, Path(folder))
            except AssertionError as error:
                failed += 1
                print(f"FAILED: {name}: {error}", flush=True)
                continue
        total.add(verified)
        print(f"{name}: {verified}, {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{total}, {failed} failed; seed {arguments.seed}")
    return 1 if failed or total.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
