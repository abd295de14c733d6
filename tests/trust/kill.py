"""kill -9 of a mount's daemon at random moments during random writes (as root).

Afterwards `qemu-img check` finds leaks at most, imagofs finds no more, every sector holds what an
fsync covered or a later write put there, and the snapshot and the base are as they were.

    python -m tests.trust.kill --moments 20 --seed 1
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests import qemu
from tests.mount.load import Mirror, run_writers
from tests.mount.mounting import Mounted, imagofs, mounting

SIZE = 24 << 20
_OPTIONS: list[dict[str, str | int | bool]] = [
    {},
    {"cluster_size": 4096},
    {"extended_l2": True},
    {"cluster_size": 512},
]
#: Exit codes of `imagofs check`: clean, or leaked clusters.
_SOUND = (0, 3)


@dataclass(frozen=True, slots=True)
class Moment:
    """What came of one kill.

    Attributes:
        options: `qemu-img create` options of the image.
        delay: Seconds from the first write to the kill.
        writes: How many writes had begun.
        syncs: How many fsyncs had succeeded.
        leaks: Leaked clusters.
    """

    options: dict[str, str | int | bool]
    delay: float
    writes: int
    syncs: int
    leaks: int

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return (
            f"killed after {self.delay:.3f} s, {self.writes} writes, {self.syncs} syncs: "
            f"{self.leaks} leaked clusters ({options or 'cluster_size=64k'})"
        )


def with_base_and_snapshot(
    folder: Path, size: int, options: dict[str, str | int | bool]
) -> tuple[Path, Path]:
    """An image over a base, both with data, with an internal snapshot. Returns both."""
    base = qemu.create(folder / "base.qcow2", size // 2 + 512 * 7, writes=["write -P 9 0 8M"])
    image = qemu.create(
        folder / "image.qcow2",
        size,
        backing=base.name,
        writes=["write -P 5 1M 6M", "write -z 3M 1M"],
        **options,  # type: ignore[arg-type]  # creation options, by any name
    )
    qemu.qemu_img("snapshot", "-c", "before", image)
    return image, base


def snapshot_contents(image: Path) -> bytes:
    """The disk as the snapshot has it."""
    flat = image.with_name("snapshot.flat")
    qemu.qemu_img("convert", "-U", "-l", "before", "-O", "raw", image, flat)
    try:
        return flat.read_bytes()
    finally:
        flat.unlink()


def kill_once(folder: Path, seed: int) -> Moment:
    """Write at random, kill at a random moment, look at what is left.

    Args:
        folder: For files; empty.
        seed: Says what is written and when it ends.

    Raises:
        AssertionError: Something is not as it must be. The files are left as they are.
    """
    rnd = random.Random(seed)
    options, delay = rnd.choice(_OPTIONS), rnd.uniform(0.02, 0.5)
    image, base = with_base_and_snapshot(folder, SIZE, options)
    snapshot, base_before = snapshot_contents(image), base.read_bytes()
    with mounting(folder) as mount:
        mounted = mount(image, "rw")
        mirror = Mirror(mounted.file.read_bytes())
        _write_and_kill(mounted, mirror, delay, seed)
        imagofs("umount", "-l", mounted.path, ok=None)
    report = qemu.check(image, leaks=True)
    found = qemu.contents(image)
    mirror.check_after_crash(found)
    assert imagofs("check", image, ok=None).returncode in _SOUND
    assert snapshot_contents(image) == snapshot, "the snapshot changed"
    assert base.read_bytes() == base_before, "the base changed"
    return Moment(options, delay, mirror.begun, mirror.syncs, report.get("leaks", 0))


def _write_and_kill(mounted: Mounted, mirror: Mirror, delay: float, seed: int) -> None:
    killed = threading.Event()

    def kill() -> None:
        time.sleep(delay)
        killed.set()
        mounted.signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run_writers(
            mounted.file, mirror, writes=1_000_000, seed=seed, largest=1 << 18, sync_every=20
        )
    except OSError as error:
        assert killed.is_set(), f"before the daemon was killed: {error}"
    finally:
        killer.join()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill the daemon during random writes.")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the first moment")
    parser.add_argument("--keep", type=Path, help="where the files of what fails are moved")
    arguments = parser.parse_args()
    writes = syncs = leaks = failed = 0
    for seed in range(arguments.seed, arguments.seed + arguments.moments):
        with tempfile.TemporaryDirectory(prefix="imagofs-kill-", dir="/var/tmp") as name:
            try:
                moment = kill_once(Path(name), seed)
            except Exception as error:
                failed += 1
                print(f"FAILED: seed {seed}: {type(error).__name__}: {error}", flush=True)
                if arguments.keep:
                    shutil.copytree(name, arguments.keep / str(seed))
                continue
        print(f"seed {seed}: {moment}", flush=True)
        writes, syncs, leaks = writes + moment.writes, syncs + moment.syncs, leaks + moment.leaks
    print(
        f"{arguments.moments} kills in {writes} writes and {syncs} syncs: {leaks} leaked clusters, "
        f"{failed} failed; first seed {arguments.seed}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
