"""`imagofs map` beside `qemu-img map`, and the picture that it draws."""

from __future__ import annotations

import json
import os
import pty
import random
import re
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from imagofs import (
    CorruptImageError,
    FormatAccess,
    MemoryStorage,
    PermissiveImplicitOpenGate,
    Qcow2,
    open_image,
)
from imagofs.chainmap import ChainMap
from imagofs.cli import main
from imagofs.cli.picture import draw
from tests import qemu
from tests.support.qemu_map import map_like_qemu, our_map

GATE = PermissiveImplicitOpenGate()
WRITES = [
    "write -P 1 0 70000",
    "write -P 2 700k 100k",
    "write -z 200k 300k",
    "write -z 910000 1000",
    "discard 256k 64k",
    "write -P 3 1500k 3000",
]
#: Name to creation options of the top image.
IMAGES: dict[str, dict[str, Any]] = {
    "raw": {"fmt": "raw"},
    "plain": {},
    "version2": {"compat": "0.10"},
    "clusters_512": {"cluster_size": 512},
    "clusters_2M": {"cluster_size": "2M"},
    "extended": {"extended_l2": True},
    "extended_16k": {"extended_l2": True, "cluster_size": "16k"},
    "metadata": {"preallocation": "metadata"},
    "metadata_512": {"preallocation": "metadata", "cluster_size": 512, "refcount_bits": 2},
    "falloc": {"preallocation": "falloc"},
    "full": {"preallocation": "full"},
    "extended_metadata": {"preallocation": "metadata", "extended_l2": True},
    "data_file": {"data_file": "guest.data"},
    "data_file_raw": {"data_file": "guest.data", "data_file_raw": True},
    "data_file_extended": {"data_file": "guest.data", "extended_l2": True},
}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", IMAGES)
def test_agrees_with_qemu_img(name: str) -> None:
    options = IMAGES[name]
    image = qemu.create(Path("image"), "2M", writes=WRITES, **options)
    map_like_qemu("-f", options.get("fmt", "qcow2"), "image")
    map_like_qemu("-f", "raw", "image")
    if name != "raw" and "data_file" not in options:
        qemu.qemu_img("snapshot", "-c", "one", image)
        qemu.qemu_io(image, "write -P 5 0 1k", "discard 700k 64k")
        map_like_qemu("image")


@pytest.mark.parametrize("name", [name for name in IMAGES if "metadata" not in name])
@pytest.mark.parametrize("size", ["1000k", "2M", "5M"])
def test_chains(name: str, size: str) -> None:
    """A raw base with holes, a layer of small clusters, and the image: each of another size."""
    qemu.create(
        Path("base"), "1200k", fmt="raw", writes=["write -P 8 100k 40k", "write -P 9 1M 4k"]
    )
    qemu.create(
        Path("middle"),
        "1800k",
        backing="base",
        backing_fmt="raw",
        cluster_size=4096,
        writes=["write -P 7 600k 9k", "write -z 1M 9k", "write -P 7 1700k 3k"],
    )
    options = {key: value for key, value in IMAGES[name].items() if key != "preallocation"}
    if options.get("fmt") == "raw" or options.get("data_file_raw"):
        options = {"compat": "0.10", "cluster_size": "32k"}
    writes = [write for write in WRITES if size != "1000k" or "1500k" not in write]
    qemu.create(Path("image"), size, backing="middle", writes=writes, **options)
    found = map_like_qemu("image")
    if options.get("cluster_size") != "2M":  # one cluster, the image's own
        assert {entry["depth"] for entry in found} == {0, 1, 2}


def test_compressed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("source").write_bytes(b"compress me " * 50000 + os.urandom(200000) + bytes(300000))
    for index, kind in enumerate(("zlib", "zstd")):
        image = f"image{index}"
        options = f"compression_type={kind}"
        qemu.qemu_img(*("convert", "-c", "-O", "qcow2", "-o", options, "source", image))
        found = map_like_qemu(image)
        assert {entry["compressed"] for entry in found} == {True, False}
        assert all("offset" not in entry for entry in found if entry["compressed"])
        assert main(["map", image]) == 0
        places = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
        assert places.count("compressed") == sum(entry["compressed"] for entry in found)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_disk_of_no_size(fmt: str) -> None:
    qemu.create(Path("image"), 0, fmt=fmt)
    assert len(map_like_qemu("-f", fmt, "image")) == 1


@pytest.mark.parametrize("subformat", ["monolithicSparse", "monolithicFlat", "streamOptimized"])
def test_vmdk(subformat: str) -> None:
    with open("source", "wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(random.Random(1).randbytes(300000))
    option = f"subformat={subformat}"
    qemu.qemu_img("convert", "-O", "vmdk", "-o", option, "source", "image.vmdk")
    map_like_qemu("image.vmdk")


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    qemu.create(Path("base"), "1200k", fmt="raw", writes=["write -P 8 100k 40k"])
    qemu.create(Path("image"), "2M", backing="base", backing_fmt="raw", writes=WRITES)
    expected = [line.split() for line in qemu.qemu_img("map", "image").splitlines()]
    for words in (["map", "image"], ["map", "--table", "image"]):
        assert main(words) == 0
        found = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert found[0] == expected[0]
        assert len(found) == len(expected) > 4
        for mine, theirs in zip(found[1:], expected[1:], strict=True):
            assert [int(word, 16) for word in mine[:3]] == [int(word, 16) for word in theirs[:3]]
            assert mine[3] == os.path.abspath(theirs[3])


def test_size_that_is_no_multiple_of_a_sector() -> None:
    Path("image").write_bytes(b"x" * 1001)
    assert sum(entry["length"] for entry in our_map("image")) == 1001


def test_an_image_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    image = qemu.create(Path("image"), "1M")

    async def hold() -> None:
        async with await open_image(image, writable=True, gate=GATE, lock=True):
            await trio.to_thread.run_sync(ask)

    def ask() -> None:
        assert main(["map", "--json", "image"]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert main(["map", "--json", "-U", "image"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["length"] == 1 << 20

    trio.run(hold)


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", "gone"]) == 1
    for words in ([], ["--json", "--table", "image"], ["-f", "floppy", "image"]):
        with pytest.raises(SystemExit) as caught:
            main(["map", *words])
        assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 4


@settings(max_examples=25)
@given(data=st.data())
def test_any_geometry(data: st.DataObject) -> None:
    """Random writes to a chain of random geometry: the same map as qemu's."""
    for name in os.listdir():
        os.unlink(name)
    below: dict[str, Any] = {}
    for depth in range(data.draw(st.integers(1, 3))):
        bits = data.draw(st.sampled_from([9, 12, 14, 16, 18]))
        fmt = data.draw(st.sampled_from(["raw", "qcow2", "qcow2"])) if not below else "qcow2"
        sectors = data.draw(st.integers(64, 4000))
        options: dict[str, Any] = {"fmt": fmt, **below}
        if fmt == "qcow2":
            options |= {
                "cluster_size": 1 << bits,
                "extended_l2": bits >= 14 and data.draw(st.booleans()),
                "refcount_bits": data.draw(st.sampled_from([1, 16, 64])),
            }
            if not below or options["extended_l2"]:
                options["preallocation"] = data.draw(st.sampled_from(["off", "metadata"]))
        writes = []
        for _ in range(data.draw(st.integers(0, 6))):
            start = data.draw(st.integers(0, sectors - 1))
            length = data.draw(st.integers(1, min(sectors - start, 600)))
            action = data.draw(st.sampled_from(["write -P 1", "write -z", "write -zu", "discard"]))
            writes.append(f"{action} {start * 512} {length * 512}")
        qemu.create(Path(f"image{depth}"), sectors * 512, writes=writes, **options)
        below = {"backing": f"image{depth}", "backing_fmt": fmt}
    image, fmt = below["backing"], below["backing_fmt"]
    expected = json.loads(qemu.qemu_img("map", "-f", fmt, "--output=json", image))
    found = trio.run(_entries, image, fmt)
    assert [(e.start, e.length, e.depth, e.present, e.zero, e.data, e.offset) for e in found] == [
        (e["start"], e["length"], e["depth"], e["present"], e["zero"], e["data"], e.get("offset"))
        for e in expected
    ]


async def _entries(image: str, fmt: str) -> list[Any]:
    async with await open_image(image, format=fmt, gate=GATE) as access:
        return [entry async for entry in ChainMap(access).entries()]


async def test_wrong_entries_are_an_error() -> None:
    memory = MemoryStorage()
    await Qcow2.create(memory, 1 << 20)
    access = FormatAccess(await Qcow2.open(memory, writable=True))
    await access.write(b"x" * 512, 0)
    await access.sync()
    driver = access.driver
    assert isinstance(driver, Qcow2)
    table = driver.metadata.l2.l1[0] & (1 << 56) - 512
    await memory.writev([memoryview((1 << 63 | 0x12200).to_bytes(8, "big"))], table)
    access = FormatAccess(await Qcow2.open(memory))
    with pytest.raises(CorruptImageError):
        async for _ in ChainMap(access).entries():
            pass


# --- the picture --------------------------------------------------------------------------------


def _make_chain() -> None:
    qemu.create(Path("base.raw"), "1M", fmt="raw", writes=["write -P 8 0 512k"])
    qemu.create(
        Path("image.qcow2"),
        "2M",
        backing="base.raw",
        backing_fmt="raw",
        cluster_size=4096,
        writes=["write -P 1 0 256k", "write -z 1M 512k", "write -P 2 1984k 64k"],
    )


@pytest.mark.parametrize("width", [60, 80, 133])
async def test_picture(width: int) -> None:
    _make_chain()
    async with await open_image("image.qcow2", gate=GATE) as image:
        picture = await draw(ChainMap(image), width=width, colours=False)
    lines = picture.splitlines()
    assert all(len(line) < width for line in lines[:3])
    assert "2 MiB" in lines[0]
    bars = {line.split("▕")[0].strip(): line.split("▕")[1].split("▏")[0] for line in lines[1:3]}
    columns = len(bars["image.qcow2"])
    top, base = bars["image.qcow2"], bars["base.raw"]
    assert len(base) == columns >= width // 2 - 10
    assert set(top[: columns // 8 - 1]) == {"█"}
    assert set(top[columns // 8 + 1 : columns // 2 - 1]) == {" "}
    assert set(top[columns // 2 + 1 : columns * 3 // 4 - 1]) == {"·"}
    assert top[-1] != " "
    assert set(base[: columns // 4 - 1]) == {"█"}
    assert set(base[columns // 2 + 1 :]) == {" "}
    assert lines[1].endswith("320 KiB")
    assert "16 %" in lines[1]
    assert "25 %" in lines[2]
    assert "256 KiB hidden" in lines[5]
    assert "512 KiB said to be zero" in lines[4]


async def test_picture_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    _make_chain()
    async with await open_image("image.qcow2", gate=GATE) as image:
        chain = ChainMap(image)
        plain = await draw(chain, width=80, colours=False)
        coloured = await draw(chain, width=80, colours=True)
        assert plain != coloured
        assert re.sub("\x1b\\[[0-9]*m", "", coloured) == plain
        monkeypatch.setenv("NO_COLOR", "1")
        assert await draw(chain, width=80, colours=True) == plain


def test_picture_of_a_disk_of_no_size() -> None:
    qemu.create(Path("image"), 0)

    async def picture() -> str:
        async with await open_image("image", gate=GATE) as image:
            return await draw(ChainMap(image), width=80, colours=True)

    assert "0 B" in trio.run(picture)


def test_terminal_gets_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    _make_chain()
    leader, follower = pty.openpty()
    with open(follower, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        assert main(["map", "image.qcow2"]) == 0
        terminal.flush()
        shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert "█" in shown
    assert "\x1b[" in shown
    assert "Mapped to" not in shown
