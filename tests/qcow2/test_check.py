"""Check: what it counts, beside `qemu-img check`; the command line; large and odd images."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagofs import CheckResult, FormatAccess, Qcow2, check_image, open_image
from imagofs.cli import main
from imagofs.errors import CorruptImageError, FormatError, UnsupportedError
from imagofs.format.qcow2 import check as check_module
from imagofs.format.qcow2 import check_numpy, check_scan
from imagofs.format.qcow2.check_report import MAX_FINDINGS, Kind
from imagofs.storage.base import StorageOpenOptions
from imagofs.storage.file import FileStorage
from imagofs.storage.memory import MemoryStorage
from tests import qemu
from tests.qcow2.damage import CASES, COPIED, Bases, Image

WRITES = ["write -P 1 0 300k", "write -P 2 1M 100k", "write -z 1800k 64k", "discard 64k 64k"]
COMPRESSED = [f"write -c -P {n} {3072 + 64 * n}k 64k" for n in range(5)]


def snapshots(path: Path) -> None:
    for number in range(3):
        qemu.qemu_img("snapshot", "-c", f"s{number}", path)
        qemu.qemu_io(path, f"write -P {number + 50} {number * 50}k 200k")


def bitmaps(path: Path) -> None:
    qemu.qemu_img("bitmap", "--add", "-g", "4096", path, "one")
    qemu.qemu_img("bitmap", "--add", "--disable", path, "two")
    qemu.qemu_io(path, "write -P 9 200k 600k")


def backed(path: Path) -> None:
    qemu.qemu_io(path, "write -P 8 100k 100k")


HEALTHY: dict[str, tuple[dict[str, Any], list[str], Callable[[Path], None] | None]] = {
    "default": ({}, WRITES + COMPRESSED, None),
    "empty": ({"size": 0}, [], None),
    "nothing written": ({}, [], None),
    "odd size": ({"size": 1_000_001}, [], None),
    "version 2": ({"compat": "0.10"}, WRITES + COMPRESSED, snapshots),
    "512 bytes": ({"cluster_size": 512}, WRITES + COMPRESSED, None),
    "512 bytes, snapshots": ({"cluster_size": 512}, WRITES, snapshots),
    "2 MiB": ({"cluster_size": "2M", "size": "20M"}, WRITES, None),
    "1 bit": ({"cluster_size": 4096, "refcount_bits": 1}, WRITES + COMPRESSED, None),
    "2 bits": ({"cluster_size": 4096, "refcount_bits": 2}, WRITES + COMPRESSED, None),
    "4 bits": ({"cluster_size": 4096, "refcount_bits": 4}, WRITES, snapshots),
    "8 bits": ({"cluster_size": 4096, "refcount_bits": 8}, WRITES, snapshots),
    "32 bits": ({"cluster_size": 4096, "refcount_bits": 32}, WRITES + COMPRESSED, snapshots),
    "64 bits": ({"cluster_size": 4096, "refcount_bits": 64}, WRITES + COMPRESSED, snapshots),
    "zstd": ({"compression_type": "zstd"}, WRITES + COMPRESSED, None),
    "snapshots": ({}, WRITES + COMPRESSED, snapshots),
    "bitmaps": ({}, WRITES, bitmaps),
    "extended": ({"extended_l2": True}, WRITES + COMPRESSED, None),
    "extended, small": (
        {"extended_l2": True, "cluster_size": 16384},
        [*WRITES, "write 601k 1k", "write -z 602k 2k"],
        snapshots,
    ),
    "extended, preallocated": (
        {"extended_l2": True, "preallocation": "metadata"},
        ["write 70k 100k"],
        None,
    ),
    "preallocated": ({"preallocation": "metadata"}, [], None),
    "data file": ({"data_file": "DATA"}, WRITES, None),
    "raw data file": ({"data_file": "DATA", "data_file_raw": True}, WRITES, None),
    "lazy refcounts": ({"lazy_refcounts": True}, WRITES, snapshots),
    "backed": ({"backing": "BASE"}, [], backed),
}


def counts(result: CheckResult) -> dict[str, int]:
    """As qemu-img names them."""
    return {
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "check-errors": result.check_errors,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
        "image-end-offset": result.image_end_offset,
    }


def qemu_counts(path: Path) -> dict[str, int] | None:
    """None if qemu-img does not open it."""
    words = ("check", "-U", "-f", "qcow2", "--output=json", path)
    output = qemu.qemu_img(*words, ok=(0, 1, 2, 3))
    if not output:
        return None
    report = json.loads(output)
    return {name: report.get(name, 0) for name in counts(CheckResult())}


async def check(path: Path) -> CheckResult:
    async with await FileStorage.open(path) as storage:
        return await check_image(storage)


def make(folder: Path, kind: str) -> Path:
    options, writes, then = HEALTHY[kind]
    options = dict(options)
    path = folder / "image.qcow2"
    if "data_file" in options:
        options["data_file"] = str(folder / "data.raw")
    if "backing" in options:
        options["backing"] = qemu.create(folder / "base.qcow2", "4M", writes=WRITES)
    qemu.create(path, options.pop("size", "4M"), writes=writes, **options)
    if then is not None:
        then(path)
    return path


@pytest.fixture
def vectorised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images are followed as large ones are."""
    for module in (check_module, check_scan):
        monkeypatch.setattr(module, "can_be_flat", lambda storage, header: True)


@pytest.mark.parametrize("kind", HEALTHY)
async def test_healthy_images_are_counted_as_qemu_img_does(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
):
    path = make(tmp_path, kind)
    result = await check(path)
    assert result.is_clean
    assert not result.findings
    assert counts(result) == qemu_counts(path)
    request.getfixturevalue("vectorised")
    assert counts(await check(path)) == counts(result)


# --- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def tables(image: Image) -> dict[str, list[int]]:
    """Where entries of the active tables are, the L2 entries in use only."""
    l1 = [image.l1 + 8 * n for n in range(image.u32(36))]
    found: dict[str, list[int]] = {"l1": l1, "refcounts": []}
    found["l2"] = [
        place
        for table in l1
        if image.u64(table)
        for place in range(
            image.u64(table) & (1 << 56) - 512,
            (image.u64(table) & (1 << 56) - 512) + image.cluster,
            8,
        )
        if image.u64(place)
    ]
    found["refcounts"] = [
        place for place in range(image.block(), image.block() + image.cluster) if image.data[place]
    ]
    return found


def damage(image: Image, chance: random.Random) -> None:
    """Change one entry or count, as a flipped bit or a lost write would."""
    places = tables(image)
    kind = chance.choice(["l1", "l2", "l2", "l2", "refcounts", "refcounts"])
    place = chance.choice(places[kind])
    if kind == "refcounts":
        image.data[place] = chance.choice([0, image.data[place] ^ 1 << chance.randrange(8)])
        return
    value = image.u64(place)
    clusters = len(image.data) // image.cluster
    image.put(
        place,
        chance.choice(
            [
                value ^ COPIED,
                value ^ 1 << chance.randrange(62),
                0,
                image.u64(chance.choice(places["l2"])),
                chance.randrange(clusters + 3) * image.cluster | COPIED,
            ]
        ),
    )


@pytest.mark.parametrize("kind", ["plain", "snapshots", "small", "extended", "version 2", "2 bits"])
async def test_random_damage_is_found_as_qemu_img_finds_it(
    tmp_path: Path, bases: Bases, kind: str, request: pytest.FixtureRequest
):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "damaged.qcow2"
    contents = []
    for _ in range(15):
        image = Image(bases[kind].data)
        damage(image, chance)
        path.write_bytes(image.data)
        theirs = qemu_counts(path)
        assert theirs is not None
        result = await check_image(MemoryStorage(image.data))
        contents.append((bytes(image.data), counts(result)))
        kinds = {finding.kind for finding in result.findings}
        words = " ".join(finding.message for finding in result.findings)
        # qemu-img takes what it finds there for an L2 table, or does not mind.
        others = ("to the beginning", "and no table", "L1 table has reserved bits")
        if Kind.OVERLAP in kinds or any(part in words for part in others):
            assert result.corruptions
        elif Kind.ENTRY in kinds:
            # Some bits that mean nothing are not seen by qemu-img.
            assert result.corruptions >= theirs["corruptions"]
        else:
            assert counts(result) == theirs
    request.getfixturevalue("vectorised")
    for data, found in contents:
        assert counts(await check_image(MemoryStorage(data))) == found


async def test_findings_say_where(bases: Bases):
    image = Image(bases["plain"].data)
    image.put(image.place(65536), image.end | COPIED)
    result = await check_image(MemoryStorage(image.data))
    finding = next(finding for finding in result.findings if finding.kind is Kind.ENTRY)
    assert finding.guest_offset == 65536
    assert finding.host_offset == image.place(65536)
    assert "behind the end of the file" in finding.message


async def test_findings_are_bounded_and_counts_are_not(bases: Bases):
    image = Image(bases["small"].data)
    block = image.block()
    image.data[block : block + 512] = bytes(512)
    wrong = qcow2_with_bad_entries(20_000)
    result = await check_image(MemoryStorage(wrong))
    assert result.corruptions >= 20_000
    assert len(result.findings) == MAX_FINDINGS


def qcow2_with_bad_entries(number: int) -> bytes:
    """An image with one large L2 table whose entries all have reserved bits."""
    from imagofs.format.qcow2.header import Header

    header = Header(3, 21, number << 21, 1, 1 << 21, 2 << 21, 1)
    contents = bytearray(5 << 21)
    encoded = header.encode()
    contents[: len(encoded)] = encoded
    contents[1 << 21 : (1 << 21) + 8] = (3 << 21 | COPIED).to_bytes(8, "big")
    contents[2 << 21 : (2 << 21) + 8] = (4 << 21).to_bytes(8, "big")
    contents[3 << 21 : (3 << 21) + number * 8] = b"\0\0\0\0\0\0\0\2" * number
    contents[4 << 21 : (4 << 21) + 10] = b"\0\1" * 5
    return bytes(contents)


@pytest.mark.parametrize(
    ("contents", "error"),
    [(b"", FormatError), (b"QFI\xfb" + bytes(600), UnsupportedError), (bytes(70000), FormatError)],
)
async def test_what_is_no_image_is_refused(contents: bytes, error: type[Exception]):
    with pytest.raises(error):
        await check_image(MemoryStorage(contents))


# --- through the driver ---------------------------------------------------------------------------


async def test_open_image_checks_itself_with_what_was_just_written(tmp_path: Path):
    path = qemu.create(tmp_path / "a.qcow2", "64M", cluster_size=4096)
    qcow2 = await Qcow2.open(path, writable=True, backing=None)
    async with FormatAccess(qcow2):
        assert (await qcow2.check()).allocated_clusters == 0
        await qcow2.writev([memoryview(bytes(range(256)) * 4096)], 12345)
        told: list[tuple[int, int]] = []
        result = await qcow2.check(lambda done, total: told.append((done, total)))
        assert result.is_clean
        assert result.allocated_clusters == 257
        assert told[-1] == (1, 1)
    assert counts(result) == qemu_counts(path)


async def test_check_of_a_read_only_image(tmp_path: Path):
    path = qemu.create(tmp_path / "a.qcow2", "1M", writes=["write 0 1M"])
    qcow2 = await Qcow2.open(path, backing=None)
    async with FormatAccess(qcow2):
        assert (await qcow2.check()).is_clean


async def test_writable_open_of_what_check_calls_corrupt_is_refused_with_what_to_run(
    bases: Bases,
):
    image = Image(bases["plain"].data)
    CASES["corrupt bit"].damage(image)
    with pytest.raises((FormatError, CorruptImageError), match="imagofs check --repair all"):
        await open_image(MemoryStorage(image.data), writable=True, format="qcow2")


# --- large and hostile images ---------------------------------------------------------------------


def measured_check(path: Path) -> tuple[dict[str, Any], float, int]:
    """The report of `imagofs check --json`, its seconds, and the peak of its memory in MiB."""
    # ru_maxrss would begin with what this process has: it is inherited through vfork and exec.
    code = (
        "import sys; from imagofs.cli import main; code = main(['check', '--json', sys.argv[1]]); "
        "words = open('/proc/self/status').read().split(); "
        "print(words[words.index('VmHWM:') + 1], file=sys.stderr); sys.exit(code)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=100
    )
    return json.loads(done.stdout), time.monotonic() - start, int(done.stderr) // 1024


def test_large_image_is_checked_in_little_time_and_memory(tmp_path: Path):
    """A quarter of a TiB; the refcount blocks take 8 MiB."""
    path = qemu.create(tmp_path / "a.qcow2", "256G", preallocation="metadata")
    report, seconds, peak = measured_check(path)
    print(f"{seconds:.2f} s, {peak} MiB")
    assert report["allocated-clusters"] == report["total-clusters"] == 4 << 20
    assert "corruptions" not in report and "leaks" not in report
    assert seconds < 30
    assert peak < 200


async def test_without_numpy_a_large_image_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = qemu.create(tmp_path / "a.qcow2", "64G", preallocation="metadata")
    with_numpy = await check(path)
    monkeypatch.setattr(check_numpy, "find_spec", lambda name: None)
    assert await check(path) == with_numpy
    assert with_numpy.allocated_clusters == 1 << 20


async def test_file_that_is_large_in_name_only_takes_no_memory(tmp_path: Path):
    """A sparse file of 8 EiB nearly, with a table that names the same block again and again."""
    path = qemu.create(tmp_path / "a.qcow2", "1M", writes=["write 0 64k"])
    image = Image(path.read_bytes())
    for index in range(1000):
        image.put(image.reftable + index * 8, image.block())
    storage = MemoryStorage(image.data)
    await storage.resize((1 << 63) - (1 << 50))
    start = time.monotonic()
    result = await check_image(storage)
    assert time.monotonic() - start < 20
    assert result.corruptions
    assert result.exit_code == 2


# --- the command line ---------------------------------------------------------------------------


def run(*words: str | Path) -> int:
    return main(["check", *map(str, words)])


def test_command_says_what_is_wrong_and_what_to_do(
    tmp_path: Path, bases: Bases, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "a.qcow2"
    path.write_bytes(bases["plain"].data)
    assert run(path) == 0
    assert "The image is clean." in capsys.readouterr().out

    image = Image(bases["plain"].data)
    CASES["leaked cluster"].damage(image)
    path.write_bytes(image.data)
    assert run(path) == 3
    assert "--repair leaks" in capsys.readouterr().out

    CASES["data in the L1 table"].damage(image)
    path.write_bytes(image.data)
    assert run(path) == 2
    output = capsys.readouterr().out
    assert "lies over the L1 table" in output
    assert "Use --repair all" in output
    assert "65536 bytes at guest offset 0x0: would be lost" in output
    assert path.read_bytes() == image.data

    assert run("--repair", "leaks", path) == 2
    output = capsys.readouterr().out
    assert "Repaired: 2 leaked clusters." in output
    assert "would be lost" in output
    assert run("--repair", "all", path) == 0
    output = capsys.readouterr().out
    assert "65536 bytes at guest offset 0x0: lost" in output
    assert "The image is clean." in output
    qemu.check(path)

    CASES["corrupt bit"].damage(image := Image(path.read_bytes()))
    path.write_bytes(image.data)
    assert run(path) == 0
    assert "marked corrupt" in capsys.readouterr().out


def test_command_prints_json_as_qemu_img_does(
    tmp_path: Path, bases: Bases, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "a.qcow2"
    for names in ((), ("leaked cluster",), ("no COPIED flag", "refcount 0 of data")):
        image = Image(bases["plain"].data)
        for name in names:
            CASES[name].damage(image)
        path.write_bytes(image.data)
        code = run("--json", path)
        ours = json.loads(capsys.readouterr().out)
        words = ("check", "-f", "qcow2", "--output=json", path)
        assert ours == json.loads(qemu.qemu_img(*words, ok=(code,)))
    assert run("--json", "--repair", "all", path) == 0
    ours = json.loads(capsys.readouterr().out)
    assert ours["corruptions-fixed"] == 3
    assert "corruptions" not in ours


def test_command_tells_losses_in_json(
    tmp_path: Path, bases: Bases, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "a.qcow2"
    image = Image(bases["snapshots"].data)
    CASES["data in the L1 table"].damage(image)
    CASES["snapshot's L1 table misaligned"].damage(image)
    path.write_bytes(image.data)
    assert run("--json", "--repair", "all", path) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["lost"] == [{"start": 0, "length": 65536, "snapshot": None}]
    assert "'one' is lost" in report["notes"][0]


def test_command_knows_what_it_cannot_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bases: Bases
):
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(4096))
    assert run(raw) == 63
    assert run("-f", "raw", raw) == 63
    assert run("-f", "qcow2", raw) == 1
    assert "not a qcow2 image" in capsys.readouterr().err
    assert run(tmp_path / "missing") == 1
    image = Image(bases["plain"].data)
    CASES["refcount block misaligned"].damage(image)
    path = tmp_path / "a.qcow2"
    path.write_bytes(image.data)
    assert run(path) == 1
    assert "could not be checked" in capsys.readouterr().out
    assert run("--repair", "all", "-U", raw) == 2
    with pytest.raises(SystemExit, match="2"):
        run("--repair", "some", raw)


async def test_command_leaves_an_image_alone_that_is_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = qemu.create(tmp_path / "a.qcow2", "1M")
    command = [sys.executable, "-m", "imagofs", "check"]
    async with await FileStorage.open(path, StorageOpenOptions(writable=True)) as storage:
        storage.lock(writable=True)
        for words, code in (([], 1), (["--repair", "all"], 1), (["-U"], 0)):
            done = subprocess.run(
                [*command, *words, path], capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == code, done
            assert bool(done.stderr) == bool(code)


def test_progress_is_drawn_on_a_terminal(tmp_path: Path):
    import os
    import pty

    path = qemu.create(tmp_path / "a.qcow2", "128G", preallocation="metadata")
    leader, follower = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "imagofs", "check", path],
            stdout=subprocess.PIPE,
            stderr=follower,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
            timeout=60,
            check=True,
        )
        os.close(follower)
        follower = -1
        drawn = os.read(leader, 65536)
    finally:
        os.close(leader)
        if follower >= 0:
            os.close(follower)
    assert b"checking" in drawn
    assert b"The image is clean." in done.stdout
