#!/usr/bin/env python3
"""Measure imagofs against qemu-storage-daemon, side by side, and print ratios.

    tests/benchmarks/compare.py [--imagofs CMD] [--qsd CMD ...] [--rows REGEX] [--pairs N]
                            [--seconds S] [--work DIR] [--json FILE] [--list]

All programs export the same image at the same time (each its own copy where a row writes).
For each row fio runs on one after the other, N times in turn; the row's figure is the median
of the N ratios imagofs / best peer, so that a machine whose speed drifts does not decide it.
Image files are read into the page cache before every run. A ratio above 1 is imagofs ahead.

The peers are the qemu-storage-daemon on PATH and, where setup_peer.sh made its tree, the newest
one too, with two iothreads; both with their faster AIO engine. In each pair the faster of them
counts, since neither is always ahead. fio, qemu-img and qemu-io must be on PATH. Needs root or
a user who may mount FUSE. Sizes are kept small enough to stay in a small page cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PEER_TREE = Path(os.environ.get("PEER_TREE", "/var/tmp/qemu-peer"))
MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One line of the table: an image, a fio job, and the figure that counts."""

    name: str
    image: str
    fio: str
    figure: str = "iops"  # or "bw"
    writes: bool = False


ROWS = [
    Row(
        "flat: random read 4k, depth 1", "flat", "--rw=randread --bs=4k --ioengine=psync --direct=1"
    ),
    Row(
        "flat: random read 4k, depth 32",
        "flat",
        "--rw=randread --bs=4k --ioengine=libaio --iodepth=32 --direct=1",
    ),
    Row(
        "flat: random read 64k, depth 8",
        "flat",
        "--rw=randread --bs=64k --ioengine=libaio --iodepth=8 --direct=1",
    ),
    Row("flat: sequential read 4k", "flat", "--rw=read --bs=4k --ioengine=psync --direct=1"),
    Row("flat: sequential read 1M", "flat", "--rw=read --bs=1M --ioengine=psync --direct=1", "bw"),
    Row("flat: sequential read 1M, cached", "flat", "--rw=read --bs=1M --ioengine=psync", "bw"),
    Row(
        "chain of 8: random read 4k, depth 1",
        "chain8",
        "--rw=randread --bs=4k --ioengine=psync --direct=1",
    ),
    Row(
        "chain of 8: sequential read 1M",
        "chain8",
        "--rw=read --bs=1M --ioengine=psync --direct=1",
        "bw",
    ),
    Row(
        "chain of 32: random read 4k, depth 1",
        "chain32",
        "--rw=randread --bs=4k --ioengine=psync --direct=1",
    ),
    Row(
        "chain of 32: random read 4k, depth 32",
        "chain32",
        "--rw=randread --bs=4k --ioengine=libaio --iodepth=32 --direct=1",
    ),
    Row(
        "chain of 32: sequential read 1M",
        "chain32",
        "--rw=read --bs=1M --ioengine=psync --direct=1",
        "bw",
    ),
    Row(
        "zlib: random read 4k, depth 1", "zlib", "--rw=randread --bs=4k --ioengine=psync --direct=1"
    ),
    Row("zlib: sequential read 4k", "zlib", "--rw=read --bs=4k --ioengine=psync --direct=1"),
    Row("zlib: sequential read 1M", "zlib", "--rw=read --bs=1M --ioengine=psync --direct=1", "bw"),
    Row("zstd: sequential read 4k", "zstd", "--rw=read --bs=4k --ioengine=psync --direct=1"),
    Row("zstd: sequential read 1M", "zstd", "--rw=read --bs=1M --ioengine=psync --direct=1", "bw"),
    Row(
        "allocated: random write 4k, depth 1",
        "flat",
        "--rw=randwrite --bs=4k --ioengine=psync --direct=1",
        writes=True,
    ),
    Row(
        "allocated: random write 4k, depth 32",
        "flat",
        "--rw=randwrite --bs=4k --ioengine=libaio --iodepth=32 --direct=1",
        writes=True,
    ),
    Row(
        "allocated: sequential write 1M",
        "flat",
        "--rw=write --bs=1M --ioengine=psync --direct=1",
        "bw",
        writes=True,
    ),
    Row(
        "empty: sequential write 1M, allocating",
        "empty",
        "--rw=write --bs=1M --ioengine=psync --direct=1",
        "bw",
        writes=True,
    ),
    Row(
        "empty: random write 64k, allocating, fsync every 32",
        "empty",
        "--rw=randwrite --bs=64k --ioengine=psync --direct=1 --fsync=32",
        writes=True,
    ),
]


def run(*argv: str | Path, **kwargs: object) -> None:
    subprocess.run([str(a) for a in argv], check=True, stdout=subprocess.DEVNULL, **kwargs)  # type: ignore[call-overload]


def make_images(work: Path) -> dict[str, tuple[Path, int]]:
    """Make each image once; return name -> (top layer, bytes of guest data)."""
    work.mkdir(parents=True, exist_ok=True)
    size = 512 * MIB
    done = work / "images.done"
    if not done.exists():
        with open(work / "random.raw", "wb") as out, open("/dev/urandom", "rb") as src:
            for _ in range(size // MIB):
                out.write(src.read(MIB))
        run(
            "qemu-img",
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            work / "random.raw",
            work / "flat.qcow2",
        )
        run("qemu-img", "create", "-f", "qcow2", work / "empty.qcow2", "4G")
        words = random.Random(2)
        vocabulary = [
            bytes(words.choices(b"abcdefghijklmnopqrstuvwxyz", k=words.randint(2, 9)))
            for _ in range(5000)
        ]
        prose = b" ".join(words.choices(vocabulary, k=300_000))
        with open(work / "text.raw", "wb") as out:
            for _ in range(size // 65536):
                at = words.randrange(len(prose) - 65536)
                out.write(prose[at : at + 65536])
        for kind in ("zlib", "zstd"):
            run(
                "qemu-img",
                "convert",
                "-c",
                "-o",
                f"compression_type={kind}",
                "-f",
                "raw",
                "-O",
                "qcow2",
                work / "text.raw",
                work / f"{kind}.qcow2",
            )
        (work / "text.raw").unlink()
        chain = work / "chain"
        chain.mkdir(exist_ok=True)
        shutil.copy(work / "flat.qcow2", chain / "layer0.qcow2")
        clusters = size // 65536
        for layer in range(1, 33):
            top = chain / f"layer{layer}.qcow2"
            run(
                "qemu-img",
                "create",
                "-f",
                "qcow2",
                "-b",
                f"layer{layer - 1}.qcow2",
                "-F",
                "qcow2",
                top,
            )
            picked = words.sample(range(clusters), clusters // 64)
            commands = [x for c in picked for x in ("-c", f"write -P {layer} {c * 65536} 65536")]
            run("qemu-io", "-n", "-f", "qcow2", top, *commands)
        done.touch()
    chain = work / "chain"
    return {
        "flat": (work / "flat.qcow2", size),
        "empty": (work / "empty.qcow2", 4096 * MIB),
        "zlib": (work / "zlib.qcow2", size),
        "zstd": (work / "zstd.qcow2", size),
        "chain8": (chain / "layer8.qcow2", size),
        "chain32": (chain / "layer32.qcow2", size),
    }


def clear(folder: Path) -> None:
    """Remove FOLDER, with mounts that an interrupted run left below it."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        point = line.split()[1]
        if point.startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", point], check=False)
    shutil.rmtree(folder, ignore_errors=True)


#: The program that belongs to the interpreter.
OWN = str(Path(sys.executable).with_name("imagofs"))


def warm(*files: Path) -> None:
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.read(4 * MIB):
                pass


def peer_commands() -> list[list[str]]:
    commands = []
    if shutil.which("qemu-storage-daemon"):
        commands.append(["qemu-storage-daemon"])
    loader = PEER_TREE / "lib64/ld-linux-x86-64.so.2"
    if loader.exists():
        lib = PEER_TREE / "usr/lib/x86_64-linux-gnu"
        commands.append(
            [
                str(loader),
                "--library-path",
                f"{lib}:{lib}/libproxy",
                str(PEER_TREE / "usr/bin/qemu-storage-daemon"),
            ]
        )
    if not commands:
        raise SystemExit("no qemu-storage-daemon: install qemu-system-common, or run setup_peer.sh")
    return commands


def version_of(command: list[str]) -> str:
    return subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]


def wait_for_size(path: Path, size: int, process: subprocess.Popen[bytes] | None) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise SystemExit(f"peer ended with {process.returncode} before it was ready")
        if path.exists() and path.stat().st_size == size and os.path.ismount(path):
            return
        time.sleep(0.05)
    raise SystemExit(f"{path} did not become a mount of {size} bytes")


class Peer:
    """qemu-storage-daemon with a FUSE export."""

    def __init__(
        self, command: list[str], image: Path, size: int, point: Path, writable: bool
    ) -> None:
        point.write_bytes(b"")
        major = int(re.search(r"version (\d+)", version_of(command))[1])  # type: ignore[index]
        threads = (
            ["--object", "iothread,id=t0", "--object", "iothread,id=t1"] if major >= 11 else []
        )
        spread = ",iothread.0=t0,iothread.1=t1" if major >= 11 else ""
        read_only, mode = ("off", "on") if writable else ("on", "off")
        aio = "io_uring" if threads else "threads"
        self.process = subprocess.Popen(
            [
                *command,
                *threads,
                "--blockdev",
                f"driver=file,filename={image},node-name=file,aio={aio},read-only={read_only}",
                "--blockdev",
                f"driver=qcow2,file=file,node-name=disk,read-only={read_only}",
                "--export",
                f"type=fuse,id=e,node-name=disk,mountpoint={point},writable={mode}{spread}",
            ]
        )
        self.file = point
        wait_for_size(point, size, self.process)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


class Imagofs:
    """The program under test: `imagofs IMAGE MOUNTPOINT`, mounted over a regular file."""

    def __init__(
        self, command: list[str], image: Path, size: int, point: Path, writable: bool
    ) -> None:
        point.write_bytes(b"")
        self.file = point
        subprocess.run(
            [*command, str(image), str(point), "-o", "rw" if writable else "ro"],
            check=True,
            timeout=60,
        )
        wait_for_size(point, size, None)

    def stop(self) -> None:
        subprocess.run([OWN, "umount", str(self.file)], check=True, timeout=120)


def layers(image: Path) -> list[Path]:
    info = json.loads(
        subprocess.run(
            ["qemu-img", "info", "-U", "--backing-chain", "--output=json", str(image)],
            capture_output=True,
            check=True,
        ).stdout
    )
    return [
        Path(layer["filename"])
        if Path(layer["filename"]).is_absolute()
        else image.parent / layer["filename"]
        for layer in info
    ]


def fio(row: Row, file: Path, size: int, seconds: float) -> float:
    argv = [
        "fio",
        "--name=row",
        f"--filename={file}",
        f"--size={size}",
        "--output-format=json",
        "--randrepeat=1",
    ]
    argv += shlex.split(row.fio)
    argv += ["--time_based", f"--runtime={seconds * 1000:.0f}ms"] if row.image != "empty" else []
    if row.image == "empty":  # each run allocates its own part, so it is bounded by work
        argv += [f"--io_size={256 * MIB}"]
    argv += [] if row.writes else ["--readonly"]
    result = subprocess.run(argv, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"fio failed on {file}: {result.stdout[-800:]}{result.stderr[-800:]}")
    job = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
    return float(job["write" if row.writes else "read"][row.figure])


def measure(
    row: Row, images: dict[str, tuple[Path, int]], args: argparse.Namespace
) -> tuple[float, float, list[float]]:
    """Return the median ratio, our median figure, and each peer's median figure."""
    image, size = images[row.image]
    scratch = args.work / "scratch"
    clear(scratch)
    scratch.mkdir()

    def start(turn: int) -> list[tuple[Imagofs | Peer, Path]]:
        programs: list[tuple[Imagofs | Peer, Path]] = []
        makers = [lambda *a: Imagofs(args.imagofs, *a)]
        makers += [lambda *a, c=command: Peer(c, *a) for command in args.qsd]  # type: ignore[misc]
        for number, make in enumerate(makers):
            top = (
                Path(shutil.copy(image, scratch / f"{number}-{turn}.qcow2"))
                if row.writes
                else image
            )
            programs.append((make(top, size, scratch / f"mount{number}-{turn}", row.writes), top))
        return programs

    ratios: list[float] = []
    figures: list[list[float]] = [[] for _ in range(1 + len(args.qsd))]
    programs: list[tuple[Imagofs | Peer, Path]] = []
    try:
        for turn in range(args.pairs):
            if not programs:
                programs = start(turn)
            order = list(range(len(programs)))
            for number in order if turn % 2 == 0 else reversed(order):
                program, top = programs[number]
                warm(*([top] if row.writes else layers(top)))
                figures[number].append(fio(row, program.file, size, args.seconds))
            ratios.append(figures[0][-1] / max(peer[-1] for peer in figures[1:]))
            if row.image == "empty":
                while programs:
                    programs.pop()[0].stop()
    finally:
        while programs:
            programs.pop()[0].stop()
    return (
        statistics.median(ratios),
        statistics.median(figures[0]),
        [statistics.median(peer) for peer in figures[1:]],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imagofs", type=shlex.split, default=[OWN])
    parser.add_argument("--qsd", type=shlex.split, action="append", help="a peer; may be repeated")
    parser.add_argument(
        "--rows", default="", help="only rows whose name matches this regular expression"
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/imagofs-bench"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    rows = [row for row in ROWS if re.search(args.rows, row.name)]
    if args.list:
        print("\n".join(row.name for row in rows))
        return
    args.qsd = args.qsd or peer_commands()
    images = make_images(args.work)
    for number, command in enumerate(args.qsd, 1):
        print(f"peer {number}: {version_of(command)}")
    print(
        f"{'row':<54}{'imagofs':>12}"
        + "".join(f"{f'peer {n}':>10}" for n in range(1, 1 + len(args.qsd)))
        + f"{'ratio':>8}"
    )
    table: list[dict[str, object]] = []
    ratios: list[float] = []
    for row in rows:
        ratio, ours, theirs = measure(row, images, args)
        unit, label = (1024, "MiB/s") if row.figure == "bw" else (1, "IOPS")
        print(
            f"{row.name:<54}{ours / unit:>12,.0f}"
            + "".join(f"{t / unit:>10,.0f}" for t in theirs)
            + f"{ratio:>8.2f}  {label}",
            flush=True,
        )
        ratios.append(ratio)
        table.append(
            {
                "row": row.name,
                "unit": label,
                "imagofs": ours / unit,
                "peers": [t / unit for t in theirs],
                "ratio": ratio,
            }
        )
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    worst = min(range(len(ratios)), key=ratios.__getitem__)
    print(
        f"geometric mean {mean:.2f}   worst {ratios[worst]:.2f} ({table[worst]['row']})   "
        f"rows behind {sum(ratio < 1 for ratio in ratios)}/{len(table)}"
    )
    if args.json:
        args.json.write_text(json.dumps({"rows": table, "mean": mean}, indent=1))


if __name__ == "__main__":
    main()
