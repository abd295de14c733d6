"""`imagofs info` and `imagofs snapshot list` beside `qemu-img info`."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from imagofs.cli import main
from tests import qemu
from tests.mount.mounting import imagofs

#: Name to keywords of `qemu.create`.
IMAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "version2": {"compat": "0.10"},
    "small_clusters": {"cluster_size": 512},
    "large_clusters": {"cluster_size": "2M"},
    "extended": {"extended_l2": True},
    "zstd": {"compression_type": "zstd"},
    "lazy": {"lazy_refcounts": True},
    "refcount1": {"refcount_bits": 1},
    "refcount64": {"refcount_bits": 64},
    "full": {"preallocation": "full"},
    "data_file": {"data_file": "guest.data"},
    "raw_data_file": {"data_file": "guest.data", "data_file_raw": True},
    "raw": {"fmt": "raw"},
}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def our_info(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["info", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", IMAGES)
def test_agrees_with_qemu_img(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    qemu.create(Path("image"), "3M", **IMAGES[name])
    assert our_info(capsys, "image") == qemu.info("image")


def test_agrees_on_snapshots_and_bitmaps(capsys: pytest.CaptureFixture[str]) -> None:
    image = qemu.create(Path("image"), "3M", writes=["write -P 1 0 64k"])
    qemu.qemu_img("snapshot", "-c", "first one", image)
    qemu.qemu_img("snapshot", "-c", "zweite ü", image)
    qemu.qemu_img("bitmap", "--add", image, "recording")
    qemu.qemu_img("bitmap", "--add", "-g", "4k", "--disable", image, "resting")
    expected = qemu.info("image")
    assert our_info(capsys, "image") == expected
    assert main(["snapshot", "list", "--json", "image"]) == 0
    assert json.loads(capsys.readouterr().out) == expected["snapshots"]
    assert main(["snapshot", "list", "image"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "zweite ü" in lines[2]
    assert main(["info", "image"]) == 0
    text = capsys.readouterr().out
    assert "first one" in text
    assert "name: resting" in text


def test_snapshot_list_without_snapshots(capsys: pytest.CaptureFixture[str]) -> None:
    qemu.create(Path("image"), "3M")
    assert main(["snapshot", "list", "image"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["snapshot", "list", "--json", "image"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("where", ["image", "./image", "sub/image", "absolute"])
def test_chain(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sub").mkdir()
    for folder in (Path("."), Path("sub")):
        qemu.create(folder / "base", "1M", fmt="raw")
        qemu.create(folder / "middle", backing="base", backing_fmt="raw", compat="0.10")
        qemu.create(folder / "image", "2M", backing="middle")
    path = os.path.abspath("sub/image") if where == "absolute" else where
    chain = our_info(capsys, "--chain", path)
    assert chain == qemu.chain_info(path)
    assert [layer["format"] for layer in chain] == ["qcow2", "qcow2", "raw"]
    assert main(["info", "--chain", path]) == 0
    assert capsys.readouterr().out.count("virtual size:") == 3


def test_backing_file_is_not_opened_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    base = qemu.create(Path("base"), "1M", fmt="raw")
    qemu.create(Path("image"), backing="base", backing_fmt="raw")
    base.unlink()
    assert our_info(capsys, "image") == qemu.info("image")
    assert main(["info", "--chain", "image"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("imagofs: ")
    assert "base" in error
    assert error.count("\n") == 1


def _encrypted(kind: str) -> None:
    options = f"encrypt.format={kind},encrypt.key-secret=key"
    if kind == "luks":
        options += ",encrypt.iter-time=10"
    for attempt in range(40):
        try:
            qemu.run(
                *("qemu-img", "create", "-q", "--object", "secret,id=key,data=abc"),
                *("-f", "qcow2", "-o", options, "image", "1M"),
            )
            return
        except AssertionError as error:
            # It measures its own speed, and gives up where the machine is busy.
            if "accurate CPU usage" not in str(error) or attempt == 39:
                raise


@pytest.mark.parametrize("kind", ["aes", "luks"])
def test_encrypted_image_is_described(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    _encrypted(kind)
    ours, expected = our_info(capsys, "image"), qemu.info("image")
    assert ours["encrypted"] is True
    assert ours["format-specific"]["data"].pop("encrypt") == {"format": kind}
    assert expected["format-specific"]["data"].pop("encrypt")["format"] == kind
    assert ours == expected
    assert main(["info", "image"]) == 0
    assert "encrypted: yes" in capsys.readouterr().out


def test_an_image_in_use_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    image = qemu.create(Path("image"), "1M")
    from imagofs import FileStorage, StorageOpenOptions

    holder = FileStorage.open_now(image, StorageOpenOptions(writable=True))
    holder.lock(writable=True)
    try:
        assert our_info(capsys, "image")["virtual-size"] == 1 << 20
    finally:
        os.close(holder._take_fds().pop())


@pytest.mark.parametrize("subformat", ["monolithicSparse", "monolithicFlat"])
def test_vmdk(subformat: str, capsys: pytest.CaptureFixture[str]) -> None:
    qemu.create(Path("base.vmdk"), "3M", fmt="vmdk", subformat=subformat)
    image = "base.vmdk"
    if subformat == "monolithicSparse":
        image = "image.vmdk"
        qemu.create(Path(image), fmt="vmdk", backing="base.vmdk", backing_fmt="vmdk")
    ours, expected = our_info(capsys, "--chain", image), qemu.chain_info(image)
    for layer in expected:
        for extent in layer["format-specific"]["data"]["extents"]:
            extent["filename"] = os.path.abspath(extent["filename"])
    assert ours == expected
    assert our_info(capsys, image) == expected[0]
    assert main(["info", image]) == 0
    assert f"create type: {subformat}" in capsys.readouterr().out


def test_size_that_is_no_multiple_of_a_sector(capsys: pytest.CaptureFixture[str]) -> None:
    Path("image").write_bytes(b"x" * 1001)
    assert our_info(capsys, "image")["virtual-size"] == 1001


def test_names_cannot_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    qemu.create(Path("base"), "1M", fmt="raw")
    image = qemu.create(Path("image"), backing="base", backing_fmt="raw")
    data = bytearray(image.read_bytes())
    place, length = struct.unpack_from(">QI", data, 8)
    assert data[place : place + length] == b"base"
    data[place : place + length] = b"\x1b[\xffm"
    image.write_bytes(data)
    assert main(["info", "image"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert r"backing file: \x1b[" in text


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (None, "No such file"),
        (b"QFI\xfb" + b"\0\0\0\3", "truncated"),
        (b"QFI\xfb" + b"\0\0\0\5" + bytes(100), "version 5"),
    ],
)
def test_what_cannot_be_opened_is_one_line(
    contents: bytes | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if contents is not None:
        Path("image").write_bytes(contents)
    assert main(["info", "image"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"imagofs: {os.path.abspath('image')}: ")
    assert words in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["info"], ["info", "a", "b"], ["info", "-f", "nope", "a"], ["snapshot"], ["snapshot", "list"]],
)
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("verb", ["info", "create", "resize", "map", "snapshot"])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"imagofs {verb}" in capsys.readouterr().out


def test_a_terminal_with_few_letters() -> None:
    """What it cannot show is escaped."""
    qemu.create(Path("ünï.qcow2"), "1M")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = imagofs("info", "ünï.qcow2", env=environment)
    assert "\\xfcn\\xef.qcow2" in done.stdout
