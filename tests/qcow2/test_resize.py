"""Resizing: contents and tables afterwards, refusals, and what a power cut or a failure leaves."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from imagofs import (
    FormatAccess,
    MemoryStorage,
    OutOfRangeError,
    PermissiveImplicitOpenGate,
    PreallocateMode,
    Qcow2,
    ReadOnlyError,
    UnsupportedError,
    create_image,
    open_image,
)
from imagofs.cli import main
from tests import qemu
from tests.support.storages import (
    SlowStorage,
)

GATE = PermissiveImplicitOpenGate()
K, M, G = 1 << 10, 1 << 20, 1 << 30

#: Creation options of qemu-img; the backing file is 3 MiB of 0x55.
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "version2": {"compat": "0.10"},
    "clusters_512": {"cluster_size": 512},
    "clusters_2M": {"cluster_size": "2M"},
    "refcount_1": {"refcount_bits": 1, "cluster_size": "4k"},
    "refcount_64": {"refcount_bits": 64, "cluster_size": 512},
    "extended": {"extended_l2": True},
    "data_file": {"data_file": "guest.data"},
    "data_file_raw": {"data_file": "guest.data", "data_file_raw": True},
    "data_file_extended": {"data_file": "guest.data", "extended_l2": True},
    "backing": {"backing": "base", "backing_fmt": "raw"},
    "backing_v2": {"backing": "base", "backing_fmt": "raw", "compat": "0.10"},
    "backing_512": {"backing": "base", "backing_fmt": "raw", "cluster_size": 512},
    "backing_extended": {"backing": "base", "backing_fmt": "raw", "extended_l2": True},
    "backing_data_file": {"backing": "base", "backing_fmt": "raw", "data_file": "guest.data"},
}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(recipe: str, size: int | str, writes: list[str]) -> Path:
    """An image with an old last cluster that holds what qemu-io wrote."""
    options = RECIPES[recipe]
    if "backing" in options:
        Path("base").write_bytes(b"\x55" * (3 * M))
    return qemu.create(Path("image"), size, writes=writes, **options)


def resize(*words: str, ok: int = 0) -> None:
    assert main(["resize", "image", *words]) == ok


@pytest.mark.parametrize("recipe", RECIPES)
def test_grow_and_shrink(recipe: str) -> None:
    """Through the sizes of a cluster's middle and of a new L1 table; a base that is longer."""
    odd = 1 * M + 5 * 512
    image = make(recipe, odd, ["write -P 1 500k 20k", f"write -P 2 {odd - 1024} 1k"])
    contents = qemu.contents(image)
    for size in (odd + 512, odd + 200 * K, 700 * M, 510 * K, 4 * M):
        resize(str(size), "--shrink")
        qemu.check(image)
        if size < 100 * M:
            contents = contents[:size].ljust(size, b"\0")
            assert qemu.contents(image) == contents, size
        else:
            qemu.qemu_io(image, f"read -P 0 {odd + 200 * K} 6M", f"read -P 0 {size - M} 1M")
        if RECIPES[recipe].get("data_file"):
            # qemu makes it as long as the last cluster reaches.
            assert size <= Path("guest.data").stat().st_size < size + 64 * K
            if RECIPES[recipe].get("data_file_raw") and size < 100 * M:
                assert Path("guest.data").read_bytes() == contents
    assert qemu.info(image)["virtual-size"] == 4 * M


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_preallocation(recipe: str, mode: str) -> None:
    image = make(recipe, "1000k", ["write -P 1 900k 100k"])
    contents = qemu.contents(image)
    used = sum(os.stat(name).st_blocks * 512 for name in os.listdir())
    resize("--preallocation", mode, "+2M")
    qemu.check(image)
    assert qemu.contents(image) == contents + bytes(2 * M)
    more = sum(os.stat(name).st_blocks * 512 for name in os.listdir()) - used
    if mode == "metadata":
        assert more < 1 * M
    else:
        # What is left of the old last cluster is not new.
        whole = 2 * M if RECIPES[recipe].get("cluster_size") != "2M" else 1 * M
        assert more >= whole - 64 * K
    before = os.stat("image").st_size
    qemu.qemu_io(image, "write -P 3 1200k 1600k")
    if RECIPES[recipe].get("cluster_size") != "2M":
        assert os.stat("image").st_size == before
    qemu.check(image)


def test_space_of_what_is_cut_off_is_returned() -> None:
    image = qemu.create(Path("image"), "40M", writes=["write -P 1 0 40M"], cluster_size="4k")
    full = image.stat().st_blocks * 512
    resize("--shrink", "1M")
    report = qemu.check(image)
    assert report["allocated-clusters"] == 256
    assert full - image.stat().st_blocks * 512 > 38 * M
    # The tables are gone too: header, refcount table and block, L1 and one L2 table are left.
    assert image.stat().st_size < 2 * M
    resize("40M")
    qemu.qemu_io(image, "write -P 2 1M 30M")
    assert image.stat().st_size < 42 * M


def test_garbage_behind_the_end_is_not_shown() -> None:
    """Somebody left mappings behind the end: they do not come back as contents."""
    image = qemu.create(Path("image"), "8M", writes=["write -P 9 0 8M"], cluster_size="4k")
    data = bytearray(image.read_bytes())
    data[24:32] = (1 * M + 512).to_bytes(8, "big")
    image.write_bytes(data)
    resize("8M")
    qemu.check(image)
    assert qemu.contents(image) == b"\x09" * (1 * M + 512) + bytes(7 * M - 512)


@pytest.mark.parametrize("cluster_size", [512, 4096])
def test_l1_tables_larger_than_a_block_counts(cluster_size: int) -> None:
    image = qemu.create(
        Path("image"), "1M", cluster_size=cluster_size, refcount_bits=64, writes=["write -P 4 0 1M"]
    )
    limit = min(32 * M // 8 * (cluster_size // 8 * cluster_size), 4 << 40)
    for size in (G, limit):
        resize(str(size))
        qemu.check(image)
        qemu.qemu_io(image, "read -P 4 0 1M", f"write -P 5 {size - 512} 512")
        qemu.check(image)
    qemu.qemu_io(image, f"read -P 5 {G - 512} 512", f"read -P 5 {limit - 512} 512")
    if limit < 4 << 40:
        resize("+512", ok=1)
    assert image.stat().st_blocks * 512 < 100 * M


def test_compressed_and_zero_clusters_at_the_end() -> None:
    source = Path("source")
    source.write_bytes(b"A" * (M - 512))
    qemu.qemu_img("convert", "-c", "-O", "qcow2", "source", "image")
    resize("+4k")
    qemu.check(Path("image"))
    assert qemu.contents(Path("image")) == source.read_bytes() + bytes(4096)
    qemu.qemu_io(Path("image"), f"write -z {M - 512} 4096")
    resize("2M")
    resize("--shrink", "300k")
    qemu.check(Path("image"))
    assert qemu.contents(Path("image")) == b"A" * (300 * K)


# --- snapshots, bitmaps, refusals ---------------------------------------------------------------


def test_snapshots_keep_their_contents() -> None:
    image = qemu.create(Path("image"), "4M", writes=["write -P 1 0 4M"], cluster_size="16k")
    qemu.qemu_img("snapshot", "-c", "full", image)
    qemu.qemu_io(image, "write -P 2 1M 1M")
    resize("9M")
    qemu.check(image)
    assert qemu.contents(image)[4 * M :] == bytes(5 * M)
    resize("--shrink", "5M")
    resize("--shrink", "3M", ok=1)
    qemu.check(image)
    qemu.qemu_img("snapshot", "-a", "full", image)
    assert qemu.contents(image) == b"\x01" * (4 * M)
    qemu.check(image)


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    def refused(reason: str, *words: str) -> None:
        before = Path("image").read_bytes()
        resize(*words, ok=1)
        error = capsys.readouterr().err
        assert reason in error, error
        assert error.startswith("imagofs: ")
        assert error.count("\n") == 1
        assert Path("image").read_bytes() == before

    image = qemu.create(Path("image"), "1M")
    refused("--shrink", "512k")
    refused("above zero", "--shrink", "-2M")
    refused("above zero", "0")
    refused("whole sectors", "3000001")
    refused("preallocate", "--preallocation", "full", "--shrink", "512k")
    refused("too large", "7E")
    qemu.qemu_img("bitmap", "--add", image, "bitmap")
    refused("bitmaps", "2M")
    qemu.create(image, "1M", compat="0.10")
    qemu.qemu_img("snapshot", "-c", "one", image)
    refused("version 2", "2M")
    qemu.create(image, "1M")
    qemu.qemu_img("snapshot", "-c", "one", image)
    refused("'one' needs", "--shrink", "512k")
    image.write_bytes(bytes(4096))
    refused("raw", "2M")
    refused("metadata", "-f", "raw", "--preallocation", "metadata", "2M")
    refused("--shrink", "-f", "raw", "1k")
    for words in (["1X"], ["--preallocation", "some", "1M"], [], ["+"]):
        try:
            assert main(["resize", "image", *words]) == 2
        except SystemExit as exit:
            assert exit.code == 2


def test_raw() -> None:
    Path("image").write_bytes(b"\x07" * 4096)
    resize("-f", "raw", "+1M")
    assert Path("image").read_bytes() == b"\x07" * 4096 + bytes(M)
    resize("-f", "raw", "--shrink", "-1M")
    assert Path("image").read_bytes() == b"\x07" * 4096
    resize("-f", "raw", "--preallocation", "falloc", "1M")
    assert Path("image").stat().st_blocks * 512 >= M
    assert Path("image").stat().st_size == M


async def test_library_errors() -> None:
    Path("base").write_bytes(b"\x55" * M)
    qemu.create(Path("image"), "512k", backing="base", backing_fmt="raw")
    async with await open_image("image", gate=GATE) as image:
        with pytest.raises(ReadOnlyError):
            await image.resize(M)
    async with await open_image("image", gate=GATE, writable=True) as image:
        for size in (-512, 513, 1 << 62):
            with pytest.raises(OutOfRangeError):
                await image.resize(size)
        with pytest.raises(UnsupportedError):
            await image.resize(512, PreallocateMode.ZERO)
        assert image.size() == 512 * K
    driver = await Qcow2.open("image", writable=True, backing=None)
    async with FormatAccess(driver) as image:
        with pytest.raises(UnsupportedError, match="without its backing file"):
            await image.resize(M)
        await image.resize(256 * K)
    async with await open_image("image", gate=GATE, writable=True) as image:
        await image.resize(M)
        contents = bytearray(M)
        await image.read(contents, 0)
        assert contents == b"\x55" * (256 * K) + bytes(768 * K)


# --- while it is used ---------------------------------------------------------------------------


async def test_requests_go_on_meanwhile() -> None:
    """Writers below the new end see neither the resize nor a lock."""
    memory = MemoryStorage()
    await Qcow2.create(memory, 4 * M, cluster_size=4096)
    driver = await Qcow2.open(SlowStorage(memory), writable=True)
    image = FormatAccess(driver)
    stop = False
    written = 0

    async def write() -> None:
        nonlocal written
        numbers = random.Random(1)
        while not stop:
            offset = numbers.randrange(0, 500 * K)
            await image.write(b"\x11" * 3000, offset)
            written += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        for size in (8 * M, 600 * M, M, 503 * K * 2, 4 * M, 512 * K, 2 * M):
            await image.resize(size)
            assert image.size() == size
        stop = True
    assert written > 10
    contents = bytearray(2 * M)
    await image.read(contents, 0)
    assert not any(contents[512 * K :])
    await image.close()
    Path("image").write_bytes(memory.to_bytes())
    qemu.check(Path("image"))
    assert qemu.contents(Path("image")) == contents


async def test_two_at_a_time() -> None:
    memory = MemoryStorage()
    await Qcow2.create(memory, M, cluster_size=512)
    image = FormatAccess(await Qcow2.open(SlowStorage(memory), writable=True))
    async with trio.open_nursery() as nursery:
        for size in (3 * M, 40 * M, 512 * K, 7 * M):
            nursery.start_soon(image.resize, size)
    assert image.size() in (3 * M, 40 * M, 512 * K, 7 * M)
    await image.write(b"end", image.size() - 3)
    await image.close()
    Path("image").write_bytes(memory.to_bytes())
    qemu.check(Path("image"))


# --- any order of events ------------------------------------------------------------------------


@settings(max_examples=25)
@given(data=st.data())
def test_any_order(data: st.DataObject) -> None:
    """Sizes, writes, zeroes and discards in any order, beside a bytearray; qemu agrees."""
    bits = data.draw(st.sampled_from([9, 10, 12, 14, 16]))
    base_sectors = data.draw(st.integers(0, 800))
    options: dict[str, Any] = {
        "cluster_size": 1 << bits,
        "refcount_bits": data.draw(st.sampled_from([1, 8, 16, 64])),
        "extended_l2": bits >= 14 and data.draw(st.booleans()),
        "version": 3,
    }
    kind = data.draw(st.sampled_from(["alone", "backing", "data file"]))
    if kind == "data file":
        options |= {"data_file": "guest.data", "data_file_raw": data.draw(st.booleans())}
    elif options["refcount_bits"] == 16 and not options["extended_l2"]:
        options["version"] = data.draw(st.sampled_from([2, 3]))
    base = os.urandom(512) * base_sectors
    size = data.draw(st.integers(1, 600)) * 512
    steps = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(["resize", "resize", "write", "zero", "discard", "reopen"]),
                st.integers(0, 1200 * 512),
                st.integers(1, 100 * 512),
                st.sampled_from([*PreallocateMode]),
            ),
            max_size=14,
        )
    )
    trio.run(_follow, options, kind, base, size, steps)


async def _follow(
    options: dict[str, Any],
    kind: str,
    base: bytes,
    size: int,
    steps: list[tuple[str, int, int, PreallocateMode]],
) -> None:
    Path("base").write_bytes(base)
    if kind == "backing":
        options |= {"backing_file": "base", "backing_format": "raw", "gate": GATE}
    await create_image("image", "qcow2", size, overwrite=True, **options)
    model = bytearray(base[:size] if kind == "backing" else b"").ljust(size, b"\0")
    image = await open_image("image", writable=True, gate=GATE)
    for action, position, length, mode in steps:
        if action == "resize":
            size = position // 512 * 512
            grows = size > len(model)
            await image.resize(size, mode if grows else PreallocateMode.NONE)
            del model[size:]
            model.extend(bytes(size - len(model)))
        elif action == "reopen":
            await image.close()
            qemu.check(Path("image"))
            image = await open_image("image", writable=True, gate=GATE)
        elif position < len(model):
            stop = min(position + length, len(model))
            if action == "write":
                model[position:stop] = os.urandom(1) * (stop - position)
                await image.write(model[position:stop], position)
            else:
                model[position:stop] = bytes(stop - position)
                change = image.write_zeroes if action == "zero" else image.discard_to_zero
                await change(position, stop - position)
        contents = bytearray(len(model))
        await image.read(contents, 0)
        assert contents == model
        assert image.size() == len(model)
    await image.close()
    qemu.check(Path("image"))
    assert qemu.contents(Path("image")) == model
    if options.get("data_file_raw"):
        assert Path("guest.data").read_bytes() == model
