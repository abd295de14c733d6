"""A mount under load for minutes: nothing grows, and everything around it goes on (as root).

fio reads and writes with 32 jobs, round after round. Meanwhile `imagofs stat`, `du`, `find`,
`stat -f`, an `imagofs umount` that must say that the mount is in use, and readers that are killed
in the middle of a read go on all the time. After each round, when nobody uses the mount, the
daemon's descriptors, threads, tasks and resident memory are looked at: from the first round to the
last they may not grow. In the end SIGTERM comes while fio writes.

    python -m tests.trust.load --requests 1000000 --seed 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from imagofs.fuse import unmounting
from tests import qemu
from tests.mount.mounting import PROGRAM, imagofs, mount_at, wait_until

M = 1 << 20
SIZE = 512 * M
#: What may be more at the end than after the first round. Memory is in bytes.
_MAY_GROW = {"descriptors": 0, "threads": 2, "tasks": 0, "waiting": 0, "resident": 8 * M}


@dataclass(frozen=True, slots=True)
class Sample:
    """The daemon at one moment.

    Attributes:
        requests: READs, WRITEs and others that it has answered.
        descriptors: That it has open.
        threads: Of the process.
        tasks: Of trio.
        waiting: Requests that wait for the image.
        resident: Bytes of memory, without the page cache.
    """

    requests: int
    descriptors: int
    threads: int
    tasks: int
    waiting: int
    resident: int

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.descriptors} descriptors, {self.threads} threads, "
            f"{self.tasks} tasks, {self.waiting} waiting, {self.resident / M:.1f} MiB resident"
        )


def look(process: int, point: Path) -> Sample:
    """Look at a daemon."""
    figures = json.loads(imagofs("stat", "--json", point).stdout)
    folder = Path(f"/proc/{process}")
    status = dict(
        line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line
    )
    return Sample(
        figures["reads"] + figures["writes"] + figures["other_requests"],
        len(os.listdir(folder / "fd")),
        int(status["Threads"]),
        figures["tasks"],
        figures["queue_depth"],
        int(status["VmRSS"].split()[0]) * 1024,
    )


def fio_command(file: Path, seconds: float, seed: int) -> list[str]:
    """32 jobs: small and large, buffered and direct, some with fsync."""
    common = [
        "fio", f"--filename={file}", "--time_based", f"--runtime={seconds}s", f"--size={SIZE}",
        f"--randseed={seed}", "--fallocate=none", "--norandommap", "--group_reporting",
        "--invalidate=0", "--minimal",
    ]  # fmt: skip
    return [
        *common,
        *("--name=small", "--numjobs=8", "--rw=randrw", "--rwmixread=70", "--bs=4k"),
        *("--ioengine=psync", "--direct=1", "--fsync=2000"),
        *("--name=deep", "--numjobs=8", "--rw=randrw", "--bssplit=4k/50:16k/30:128k/20"),
        *("--ioengine=libaio", "--iodepth=8", "--direct=1", "--fsync=0"),
        *("--name=reads", "--numjobs=8", "--rw=randread", "--bsrange=4k-16k"),
        *("--ioengine=psync", "--direct=1"),
        *("--name=cached", "--numjobs=8", "--rw=randread", "--bsrange=512-64k"),
        *("--ioengine=psync", "--direct=0"),
    ]


class Bystanders:
    """What goes on beside the load, each in a thread, until `stop`."""

    def __init__(self, point: Path, file: Path, seed: int) -> None:
        self.point, self.file = point, file
        self.rnd = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._stop = threading.Event()
        work = (self._stat, self._du, self._find, self._busy, self._kill_readers)
        self._threads = [threading.Thread(target=self._loop, args=(one,)) for one in work]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop, and raise what went wrong."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.errors, self.errors[0]

    def _loop(self, work: Callable[[], str]) -> None:
        while not self._stop.wait(0.3):
            try:
                self.counts[work()] += 1
            except Exception as error:
                self.errors.append(f"{work}: {error!r}")
                return

    def _stat(self) -> str:
        imagofs("stat", self.point)
        return "imagofs stat"

    def _du(self) -> str:
        qemu.run("du", "-s", self.point)
        qemu.run("stat", "-f", self.point)
        return "du and stat -f"

    def _find(self) -> str:
        assert str(self.file) in qemu.run("find", self.point, "-type", "f", "-size", "+1M")
        return "find"

    def _busy(self) -> str:
        done = imagofs("umount", self.point, ok=1)
        assert "in use" in done.stderr, done.stderr
        return "umount refused"

    def _kill_readers(self) -> str:
        command = ["dd", f"if={self.file}", "of=/dev/null", "bs=1M", "iflag=direct"]
        for _ in range(3):
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as reader:
                time.sleep(self.rnd.uniform(0.001, 0.05))
                reader.kill()
        return "three readers killed"


class Load:
    """A daemon in the foreground, so that its exit code and its log are there at the end."""

    def __init__(self, folder: Path, seed: int) -> None:
        base = qemu.create(folder / "base.qcow2", SIZE, writes=["write -P 9 0 64M"])
        self.image = qemu.create(
            folder / "image.qcow2",
            backing=base.name,
            cluster_size=16384,
            writes=["write -P 5 1M 6M"],
        )
        self.point = folder / "point"
        self.point.mkdir()
        self.seed = seed
        self.file = self.point / "image.raw"
        self._log = (folder / "log").open("w+")
        command = [str(PROGRAM), "-f", str(self.image), str(self.point), "-o", "rw"]
        self.process = subprocess.Popen(command, stderr=self._log)
        wait_until(lambda: mount_at(self.point) is not None or self.process.poll() is not None)

    def round(self, number: int, seconds: float) -> tuple[Sample, Counter[str]]:
        """One round of load; how the daemon is afterwards, and what went on beside it."""
        with self.file.open("rb"):  # so that `imagofs umount` finds it in use at any time
            bystanders = Bystanders(self.point, self.file, self.seed + number)
            bystanders.start()
            try:
                command = fio_command(self.file, seconds, self.seed + number)
                qemu.run(*command, timeout=seconds * 4 + 120)
            finally:
                bystanders.stop()
        wait_until(lambda: look(self.process.pid, self.point).waiting == 0)
        # trio lets threads go that have had nothing to do for ten seconds.
        time.sleep(11)
        return look(self.process.pid, self.point), bystanders.counts

    def end(self) -> None:
        """SIGTERM while fio is at work: it is served to its end, then the daemon ends."""
        command = fio_command(self.file, 10, self.seed)
        before = look(self.process.pid, self.point).requests
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as fio:
            wait_until(lambda: look(self.process.pid, self.point).requests > before + 1000)
            self.process.send_signal(signal.SIGTERM)
            wait_until(lambda: mount_at(self.point) is None)
            _, _ = fio.communicate(timeout=60)
            assert fio.returncode == 0, "fio met an error after SIGTERM"
        code = self.process.wait(timeout=60)
        self._log.seek(0)
        log = self._log.read()
        assert code == 0 and "Traceback" not in log, f"exit code {code}: {log}"
        qemu.check(self.image)

    def clean_up(self) -> None:
        """Leave nothing behind."""
        self.process.kill()
        self.process.wait()
        if mount_at(self.point) is not None:
            unmounting.detach(str(self.point))
        with suppress(OSError):
            self._log.close()


def growth(first: Sample, last: Sample) -> list[str]:
    """What grew more than it may."""
    return [
        f"{name}: {getattr(first, name)} became {getattr(last, name)}"
        for name, allowed in _MAY_GROW.items()
        if getattr(last, name) > getattr(first, name) + allowed
    ]


def run(folder: Path, *, requests: int, seconds: float, at_most: float, seed: int) -> list[str]:
    """Rounds of load until there were so many requests after the first; then the end.

    Args:
        folder: For files.
        requests: So many.
        seconds: Of each round.
        at_most: No round begins later than so many seconds from now.
        seed: Of everything.

    Returns:
        What grew.

    Raises:
        AssertionError: Something is not as it must be.
    """
    deadline = time.monotonic() + at_most
    load = Load(folder, seed)
    counts: Counter[str] = Counter()
    try:
        first, counts = load.round(0, seconds)
        print(f"round 0: {first}", flush=True)
        last, number = first, 0
        while last.requests < first.requests + requests and time.monotonic() < deadline:
            number += 1
            last, beside = load.round(number, seconds)
            counts.update(beside)
            print(f"round {number}: {last}", flush=True)
        load.end()
    finally:
        load.clean_up()
    print(", ".join(f"{count} times {what}" for what, count in counts.items()))
    print(f"growth over {last.requests - first.requests} requests: {growth(first, last) or 'none'}")
    return growth(first, last)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Load a mount, and see that nothing grows.")
    parser.add_argument("--requests", type=int, default=1_000_000, help="after the first round")
    parser.add_argument("--seconds", type=float, default=30, help="of fio in each round")
    parser.add_argument("--at-most", type=float, default=3600, help="seconds for all rounds")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagofs-load-", dir="/var/tmp") as name:
        grown = run(
            Path(name),
            requests=arguments.requests,
            seconds=arguments.seconds,
            at_most=arguments.at_most,
            seed=arguments.seed,
        )
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
