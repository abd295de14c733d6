"""Sizes and names, as people read and write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagofs.cli.text import format_size, parse_size, printable, table
from tests import qemu


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512b", 512),
        ("10k", 10 << 10),
        ("10G", 10 << 30),
        ("1.5M", 3 << 19),
        ("1.3k", 1331),
        ("2.T", 2 << 40),
        ("0x1000", 4096),
        ("7E", 7 << 60),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", "1.3", "1e3", "1MiB", "1MB", "1 M", "M", "8E", "٣", "0x", ".5M"]
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|bytes"):
        parse_size(text)


@pytest.mark.parametrize(
    "size", [0, 1, 999, 1000, 1023, 1024, 200704, 3 << 20, 10234 << 10, 999 << 30, 5 << 60]
)
def test_format_size_is_qemus(size: int, tmp_path: Path) -> None:
    image = tmp_path / "image"
    if size < 1 << 43:
        with image.open("wb") as file:
            file.truncate(size)
    else:
        # More than a file system holds.
        assert format_size(size) == "5 EiB"
        return
    rounded = -(-size // 512) * 512
    lines = qemu.qemu_img("info", "-f", "raw", image).splitlines()
    (line,) = [line for line in lines if line.startswith("virtual size: ")]
    assert line == f"virtual size: {format_size(rounded)} ({rounded} bytes)"


@given(st.integers(0, (1 << 63) - 1))
def test_format_size_is_near(size: int) -> None:
    number, unit = format_size(size).split()
    shown = float(number) * 1024.0 ** "BKMGTPE".index(unit[0])
    assert abs(shown - size) <= 0.005 * size


@given(st.text())
def test_printable(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


def test_table() -> None:
    text = table(("A", "NUMBER"), [("long text", "1"), ("b", "22")], right=(1,))
    assert text.splitlines() == ["A          NUMBER", "long text       1", "b              22"]
