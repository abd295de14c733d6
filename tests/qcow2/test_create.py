"""Creating images: what qemu-img makes of them, what is refused, and what a power cut leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imagofs import (
    ChainError,
    DenyImplicitOpenGate,
    GateDeniedError,
    LockedError,
    OutOfRangeError,
    PermissiveImplicitOpenGate,
    PreallocateMode,
    Qcow2,
    UnsupportedError,
    create_image,
    open_image,
)
from imagofs.cli import main
from imagofs.format.qcow2.creation import Parameters, plan_layout
from imagofs.format.qcow2.header import parse_header
from tests import qemu

GATE = PermissiveImplicitOpenGate()

#: Words for `imagofs create` and `qemu-img create`, which mean the same to both.
RECIPES: dict[str, list[str]] = {
    "plain": [],
    "version2": ["-o", "compat=0.10"],
    "v2_metadata": ["-o", "compat=v2,preallocation=metadata"],
    "clusters_512": ["-o", "cluster_size=512"],
    "clusters_4k": ["-o", "cluster_size=4k,compat=v3"],
    "clusters_2M": ["-o", "cluster_size=2M"],
    "refcount_1": ["-o", "refcount_bits=1"],
    "refcount_2": ["-o", "refcount_bits=2,cluster_size=1k"],
    "refcount_8": ["-o", "refcount_bits=8,preallocation=metadata,cluster_size=512"],
    "refcount_32": ["-o", "refcount_bits=32"],
    "refcount_64": ["-o", "refcount_bits=64,cluster_size=512,preallocation=metadata"],
    "extended": ["-o", "extended_l2=on"],
    "extended_16k": ["-o", "extended_l2=on,cluster_size=16k"],
    "zstd": ["-o", "compression_type=zstd"],
    "lazy": ["-o", "lazy_refcounts=on"],
    "metadata": ["-o", "preallocation=metadata"],
    "falloc": ["-o", "preallocation=falloc"],
    "full": ["-o", "preallocation=full,cluster_size=128k"],
    "extended_full": ["-o", "extended_l2=on,preallocation=full"],
    "data_file": ["-o", "data_file=guest.data"],
    "data_file_metadata": ["-o", "data_file=guest.data,preallocation=metadata"],
    "data_file_falloc": ["-o", "data_file=guest.data,preallocation=falloc,extended_l2=on"],
    "data_file_raw": ["-o", "data_file=guest.data,data_file_raw=on"],
    "data_file_raw_full": ["-o", "data_file=guest.data,data_file_raw=on,preallocation=full"],
    "backing": ["-b", "base", "-F", "raw"],
    "backing_v2": ["-b", "base", "-F", "raw", "-o", "compat=0.10,cluster_size=512"],
    "backing_options": ["-o", "backing_file=base,backing_fmt=raw"],
    "backing_extended": ["-b", "base", "-F", "raw", "-o", "extended_l2=on,preallocation=metadata"],
    "backing_data_file": ["-b", "base", "-F", "raw", "-o", "data_file=guest.data"],
    "backing_chain": ["-b", "overlay", "-F", "qcow2"],
    "unsafe": ["-u", "-b", "missing", "-F", "qcow2"],
    "everything": [
        *("-b", "base", "-F", "raw", "-o"),
        "cluster_size=32k,extended_l2=on,compression_type=zstd,lazy_refcounts=on,refcount_bits=64",
    ],
    "raw": ["-f", "raw"],
    "raw_falloc": ["-f", "raw", "-o", "preallocation=falloc"],
    "raw_full": ["-f", "raw", "-o", "preallocation=full"],
}
#: Recipes that are tried with sizes that are special.
THOROUGH = {"plain", "clusters_512", "data_file_raw", "backing", "backing_extended"}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_backing_files() -> None:
    qemu.create(Path("base"), "1M", fmt="raw", writes=["write -P 5 3000 500k"])
    qemu.create(Path("overlay"), backing="base", backing_fmt="raw", writes=["write -P 6 600k 100k"])


def facts(image: str) -> dict[str, Any]:
    info = qemu.info(Path(image))
    del info["actual-size"]
    return info


@pytest.mark.parametrize("recipe", RECIPES)
def test_as_qemu_img_does(recipe: str) -> None:
    """The same words make an image of the same description and contents."""
    make_backing_files()
    words = RECIPES[recipe]
    sizes = [["1500k"]]
    if recipe in THOROUGH:
        sizes += [["0"], ["1000"], *([[]] if "-b" in words else [])]
    for size in sizes:
        results = []
        for make in (lambda argv: qemu.qemu_img("create", "-q", "-f", "qcow2", *argv), our_create):
            for leftover in ("image", "guest.data"):
                Path(leftover).unlink(missing_ok=True)
            make([*words, "image", *size])
            if recipe == "unsafe":
                results.append((facts("image"), b""))
                continue
            fmt = "raw" if recipe.startswith("raw") else "qcow2"
            results.append((facts("image"), qemu.contents(Path("image"), fmt)))
            if not recipe.startswith("raw"):
                qemu.check(Path("image"))
        assert results[0] == results[1], size
        if Path("guest.data").exists():
            assert Path("guest.data").stat().st_size == results[1][0]["virtual-size"]


def our_create(words: list[str]) -> None:
    assert main(["create", *words]) == 0


@pytest.mark.parametrize("recipe", [name for name in RECIPES if not name.startswith("raw")])
def test_can_be_used(recipe: str) -> None:
    """qemu writes to it, and finds again what it wrote."""
    if recipe == "unsafe":
        qemu.create(Path("missing"), "1M")
    make_backing_files()
    our_create([*RECIPES[recipe], "image", "3M"])
    qemu.qemu_io(Path("image"), "write -P 1 65000 100000", "write -z 1M 70k", "write -P 2 2M 1M")
    qemu.check(Path("image"))
    contents = qemu.contents(Path("image"))
    assert contents[65000:165000] == b"\1" * 100000
    assert contents[2 << 20 :] == b"\2" * (1 << 20)


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("data_file", [False, True])
def test_space(preallocation: str, data_file: bool) -> None:
    """Preallocation takes the space that it says, and not more."""
    options = f"preallocation={preallocation}" + (",data_file=guest.data" if data_file else "")
    our_create(["-o", options, "image", "4M"])
    holder = os.stat("guest.data" if data_file else "image")
    space = holder.st_blocks * 512
    if preallocation in ("falloc", "full"):
        assert space >= 4 << 20
    else:
        assert space < 1 << 20
    mapped = [piece["data"] for piece in json.loads(qemu.qemu_img("map", "--output=json", "image"))]
    assert any(mapped) == (preallocation == "full") or preallocation in ("metadata", "falloc")
    if preallocation == "off":
        assert not any(mapped)


#: Words that both programs refuse, and a word of our reason.
REFUSED: dict[str, tuple[list[str], str]] = {
    "cluster_256": (["-o", "cluster_size=256", "image", "1M"], "cluster size"),
    "cluster_4M": (["-o", "cluster_size=4M", "image", "1M"], "cluster size"),
    "cluster_3000": (["-o", "cluster_size=3000", "image", "1M"], "cluster size"),
    "refcount_3": (["-o", "refcount_bits=3", "image", "1M"], "refcount"),
    "refcount_128": (["-o", "refcount_bits=128", "image", "1M"], "refcount"),
    "refcount_0": (["-o", "refcount_bits=0", "image", "1M"], "refcount"),
    "v2_refcount": (["-o", "compat=v2,refcount_bits=8", "image", "1M"], "version 2"),
    "v2_lazy": (["-o", "compat=v2,lazy_refcounts=on", "image", "1M"], "version 2"),
    "v2_extended": (["-o", "compat=v2,extended_l2=on", "image", "1M"], "version 2"),
    "v2_zstd": (["-o", "compat=v2,compression_type=zstd", "image", "1M"], "version 2"),
    "v2_data_file": (["-o", "compat=v2,data_file=guest.data", "image", "1M"], "version 2"),
    "lz4": (["-o", "compression_type=lz4", "image", "1M"], "compression"),
    "version": (["-o", "compat=v4", "image", "1M"], "compat"),
    "extended_8k": (["-o", "cluster_size=8k,extended_l2=on", "image", "1M"], "extended"),
    "raw_alone": (["-o", "data_file_raw=on", "image", "1M"], "raw data file"),
    "raw_backing": (
        ["-b", "base", "-F", "raw", "-o", "data_file=guest.data,data_file_raw=on", "image", "1M"],
        "raw data file",
    ),
    "no_format": (["-b", "base", "image"], "format"),
    "format_alone": (["-F", "raw", "image", "1M"], "backing"),
    "missing_backing": (["-b", "gone", "-F", "raw", "image", "1M"], "gone"),
    "wrong_format": (["-b", "base", "-F", "qcow2", "image"], "qcow2"),
    "unknown_format": (["-b", "base", "-F", "nope", "image", "1M"], "nope"),
    "empty_backing": (["-b", "", "-F", "raw", "image", "1M"], "name"),
    "own_backing": (["-b", "image", "-F", "qcow2", "image", "1M"], "image"),
    "backing_metadata": (
        ["-b", "base", "-F", "raw", "-o", "preallocation=metadata", "image"],
        "preallocation",
    ),
    "backing_full": (
        ["-b", "base", "-F", "raw", "-o", "preallocation=full", "image"],
        "preallocation",
    ),
    "preallocation": (["-o", "preallocation=some", "image", "1M"], "preallocation"),
    "raw_metadata": (["-f", "raw", "-o", "preallocation=metadata", "image", "1M"], "metadata"),
    "raw_cluster": (["-f", "raw", "-o", "cluster_size=64k", "image", "1M"], "cluster size"),
    "raw_backed": (["-f", "raw", "-b", "base", "-F", "raw", "image", "1M"], "backing file"),
    "no_size": (["image"], "size"),
    "two_sizes": (["-o", "size=5M", "image", "6M"], "size"),
    "bad_size": (["image", "10X"], "size"),
    "unknown_option": (["-o", "speed=high", "image", "1M"], "speed"),
    "no_value": (["-o", "lazy_refcounts=maybe", "image", "1M"], "lazy_refcounts"),
    "too_large": (["-o", "cluster_size=512", "image", "129G"], "too large"),
    "far_too_large": (["image", "7E"], "too large"),
    "long_name": (["-u", "-b", "n" * 1024, "-F", "raw", "image", "1M"], "longer"),
    "name_beyond_cluster": (
        ["-u", "-b", "n" * 500, "-F", "raw", "-o", "cluster_size=512", "image", "1M"],
        "header",
    ),
    "folder": (["gone/image", "1M"], "No such file"),
    "data_folder": (["-o", "data_file=gone/guest.data", "image", "1M"], "No such file"),
    "data_is_image": (["-o", "data_file=image", "image", "1M"], "image itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_as_by_qemu_img(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_backing_files()
    words, reason = REFUSED[case]
    argv = words if "-f" in words else ["-f", "qcow2", *words]
    with pytest.raises(AssertionError, match="exit code 1"):
        qemu.qemu_img("create", "-q", *argv)
    for leftover in ("image", "guest.data"):
        Path(leftover).unlink(missing_ok=True)
    assert main(["create", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert reason in error
    assert error.startswith("imagofs: ")
    assert error.count("\n") == 1
    assert sorted(os.listdir()) == ["base", "overlay"]


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-o", "speed=high", "image", "1M"], ["image", "10X"], ["-o", "size", "image"]):
        assert main(["create", *words]) == 2
    for words in ([], ["-f", "vmdk", "image", "1M"], ["image", "1M", "2M"]):
        with pytest.raises(SystemExit) as caught:
            main(["create", *words])
        assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 6


# --- files that exist -------------------------------------------------------------------------


def test_existing_files_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    Path("image").write_bytes(b"mine")
    assert main(["create", "image", "1M"]) == 1
    assert "exists" in capsys.readouterr().err
    assert Path("image").read_bytes() == b"mine"
    Path("guest.data").write_bytes(b"mine too")
    assert main(["create", "-o", "data_file=guest.data", "new", "1M"]) == 1
    assert Path("guest.data").read_bytes() == b"mine too"
    assert not Path("new").exists()


def test_overwrite() -> None:
    Path("image").write_bytes(os.urandom(3 << 20))
    Path("guest.data").write_bytes(os.urandom(3 << 20))
    our_create(["--overwrite", "-o", "data_file=guest.data,data_file_raw=on", "image", "2M"])
    qemu.check(Path("image"))
    assert qemu.contents(Path("image")) == bytes(2 << 20)
    assert Path("guest.data").read_bytes() == bytes(2 << 20)


async def test_chain_is_never_overwritten() -> None:
    make_backing_files()
    before = Path("base").read_bytes()
    for name in ("base", "overlay"):
        with pytest.raises(ChainError, match="backing chain"):
            await create_image(
                name,
                "qcow2",
                backing_file="overlay",
                backing_format="qcow2",
                gate=GATE,
                overwrite=True,
            )
    os.symlink("base", "link")
    with pytest.raises(ChainError, match="backing chain"):
        await Qcow2.create(
            "new",
            1 << 20,
            backing_file="overlay",
            backing_format="qcow2",
            data_file="link",
            gate=GATE,
            overwrite=True,
        )
    assert Path("base").read_bytes() == before
    assert not Path("new").exists()


async def test_image_in_use_is_not_overwritten() -> None:
    qemu.create(Path("image"), "1M")
    async with await open_image("image", writable=True, gate=GATE, lock=True):
        with pytest.raises(LockedError):
            await create_image("image", "qcow2", 1 << 20, overwrite=True)
    qemu.check(Path("image"))


async def test_gate_is_asked() -> None:
    make_backing_files()
    with pytest.raises(GateDeniedError, match="base"):
        await create_image("image", "qcow2", backing_file="base", backing_format="raw")
    with pytest.raises(GateDeniedError):
        await create_image(
            "image",
            "qcow2",
            1 << 20,
            backing_file="base",
            backing_format="raw",
            gate=DenyImplicitOpenGate(),
        )
    assert not Path("image").exists()
    await create_image(
        "image", "qcow2", 1 << 20, backing_file="base", backing_format="raw", check_backing=False
    )
    with pytest.raises(GateDeniedError):
        await create_image(
            "other", "qcow2", backing_file="base", backing_format="raw", check_backing=False
        )


async def test_names_count_from_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    make_backing_files()
    Path("sub").mkdir()
    os.rename("base", "sub/base")
    await create_image(
        "sub/image",
        "qcow2",
        data_file="guest.data",
        backing_file="base",
        backing_format="raw",
        gate=GATE,
    )
    assert Path("sub/guest.data").stat().st_size == 1 << 20
    async with await open_image("sub/image", gate=GATE) as image:
        contents = bytearray(image.size())
        await image.read(contents, 0)
    assert contents == Path("sub/base").read_bytes()
    # For qemu the data file counts from the working directory.
    monkeypatch.chdir("sub")
    assert qemu.contents(Path("image")) == contents


async def test_protocols_are_no_names() -> None:
    with pytest.raises(UnsupportedError, match="protocol"):
        await create_image("image", "qcow2", 1 << 20, data_file="nbd:localhost")
    await create_image("image", "qcow2", 1 << 20, data_file="./nbd:localhost")
    async with await open_image("image", gate=GATE) as image:
        await image.read(bytearray(512), 0)
    assert Path("nbd:localhost").exists()


async def test_formats() -> None:
    with pytest.raises(UnsupportedError, match="cannot be created"):
        await create_image("image", "vmdk", 1 << 20)
    with pytest.raises(UnsupportedError, match="not known"):
        await create_image("image", "floppy", 1 << 20)
    with pytest.raises(OutOfRangeError):
        await create_image("image", "raw", -1)
    with pytest.raises(OutOfRangeError):
        await create_image("image", "qcow2", -1)
    with pytest.raises(OutOfRangeError):
        await create_image("image", "qcow2", 512, version=4)
    with pytest.raises(UnsupportedError):
        await create_image("image", "raw", 512, version=3)
    assert not Path("image").exists()


async def test_mode_and_feature_names() -> None:
    await create_image("image", "qcow2", 1 << 20, mode=0o600)
    assert Path("image").stat().st_mode & 0o777 == 0o600
    data = bytearray(Path("image").read_bytes())
    data[79] |= 1 << 4 | 1 << 5
    Path("image").write_bytes(data)
    with pytest.raises(AssertionError, match="Unknown incompatible feature: 20"):
        qemu.qemu_img("info", "image")
    data[79] = 1 << 2
    Path("image").write_bytes(data)
    with pytest.raises(UnsupportedError):
        parse_header(bytes(data[:72]) + b"\0" * 6 + b"\0\x80" + bytes(data[80:]))


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_on_a_block_device(preallocation: str) -> None:
    with open("disk", "wb") as file:
        file.write(b"\xaa" * (4 << 20))
    device = qemu.run("losetup", "--show", "-f", "disk").strip()
    try:
        words = ["--overwrite", "-o", f"preallocation={preallocation}", device]
        assert main(["create", *words, "8M" if preallocation != "off" else "1P"]) == 1
        assert main(["create", *words[1:], "1M"]) == 1
        our_create([*words, "2M"])
        qemu.run("sync")
        qemu.check(Path(device))
        qemu.qemu_img("convert", "-f", "qcow2", "-O", "raw", device, "flat")
        assert Path("flat").read_bytes() == bytes(2 << 20)
    finally:
        qemu.run("losetup", "-d", device)


# --- layouts ------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(data=st.data())
def test_any_geometry_is_clean(data: st.DataObject) -> None:
    bits = data.draw(st.integers(9, 21))
    preallocate = data.draw(
        st.sampled_from([PreallocateMode.NONE, PreallocateMode.FORMAT_ALLOCATE])
    )
    data_file = data.draw(st.booleans())
    # Enough clusters for several tables and blocks, and few enough to be quick.
    largest = min(1 << bits + 12, 1 << 40)
    size = data.draw(st.integers(0, largest // 512)) * 512
    options: dict[str, Any] = {
        "cluster_size": 1 << bits,
        "refcount_bits": 1 << data.draw(st.integers(0, 6)),
        "extended_l2": bits >= 14 and data.draw(st.booleans()),
        "data_file": "guest.data" if data_file else None,
        "data_file_raw": data_file and data.draw(st.booleans()),
        "preallocate": preallocate,
    }
    image = Path("image")
    trio.run(lambda: create_image(image, "qcow2", size, **options))
    report = qemu.check(image)
    allocated = options["data_file_raw"] or preallocate is not PreallocateMode.NONE
    clusters = -(-size // (1 << bits))
    assert report.get("allocated-clusters", 0) == (clusters if allocated else 0)
    assert qemu.info(image)["virtual-size"] == size
    for name in os.listdir():
        os.unlink(name)


@settings(max_examples=300)
@given(
    size=st.integers(0, (1 << 63) // 512 - 1).map(lambda sectors: sectors * 512),
    bits=st.integers(9, 21),
    order=st.integers(0, 6),
    mode=st.sampled_from(list(PreallocateMode)),
)
@example(size=33_286_254_080, bits=9, order=6, mode=PreallocateMode.FORMAT_ALLOCATE)
def test_layouts_do_not_overlap(size: int, bits: int, order: int, mode: PreallocateMode) -> None:
    try:
        layout = plan_layout(
            Parameters(size, cluster_size=1 << bits, refcount_bits=1 << order, preallocate=mode)
        )
    except OutOfRangeError:
        # What an L1 table of 32 MiB maps at least, and what a refcount table of 8 MiB counts: small
        # clusters with wide counts, if the disk's clusters are there; tables come on top.
        counted = 1 << 20 + 2 * bits + 3 - order
        assert size >= 1 << 37 or (mode is not PreallocateMode.NONE and size >= counted * 15 // 16)
        return
    header = layout.header
    assert layout.blocks << bits + 3 - order >= layout.clusters
    assert (layout.blocks - 1) << bits + 3 - order < layout.clusters
    assert header.reftable_clusters << bits >= layout.blocks * 8
    assert header.l1_entries >= header.l1_entries_needed
    assert layout.l1_clusters << bits >= header.l1_entries * 8
    first_cluster = header.encode().ljust(1 << bits, b"\0")
    assert parse_header(first_cluster).size == size
