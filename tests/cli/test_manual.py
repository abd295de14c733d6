"""Manual pages, completion and help: made from one source, and complete."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from imagofs.cli import VERBS, manual, options
from imagofs.cli.completion import script
from imagofs.cli.option_table import OPTIONS, help_text
from tests.mount.mounting import imagofs

ROOT = Path(__file__).parents[2]
NAMES = {form.partition("=")[0] for option in OPTIONS for form in option.forms}


def test_every_mount_option_is_described() -> None:
    taken = {*options._FLAGS, *options._VALUES, "allow", "overlay", "X-mount.mkdir"}
    assert taken == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_option_is_in_every_text(name: str) -> None:
    assert re.search(rf"(^|[ ,]){name}\b", help_text(), re.MULTILINE)
    assert f"`{name}" in (ROOT / "README.md").read_text()
    for text in manual.pages().values():
        assert name.replace("-", "\\-") in text


def test_pages() -> None:
    pages = manual.pages()
    assert set(pages) == {"imagofs.1", "mount.imagofs.8"}
    for verb in VERBS:
        assert f"imagofs {verb}".replace("-", "\\-") in pages["imagofs.1"] or verb == "mount"
    assert "nofail" in pages["mount.imagofs.8"]
    if (groff := shutil.which("groff")) is not None:
        for text in pages.values():
            done = subprocess.run(
                [groff, "-man", "-ww", "-z", "-Tutf8"], input=text, capture_output=True, text=True
            )
            assert (done.returncode, done.stderr) == (0, "")


def test_install(tmp_path: Path) -> None:
    output = imagofs("install-manual", "--prefix", tmp_path).stdout.split()
    assert output == [
        f"{tmp_path}/share/man/man1/imagofs.1",
        f"{tmp_path}/share/man/man8/mount.imagofs.8",
    ]
    assert Path(output[0]).read_text() == manual.pages()["imagofs.1"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["imagofs", "um"], ["umount"]),
        (["imagofs", "disk"], ["disk.qcow2"]),
        (["imagofs", "umount", "--st"], ["--stale"]),
        (["imagofs", "loop", "att"], ["attach"]),
        (["imagofs", "disk.qcow2", "mnt", "-o", "st"], ["stop_timeout="]),
        (["imagofs", "disk.qcow2", "mnt", "-o", "rw,allow_o"], ["rw,allow_other"]),
        (["imagofs", "disk.qcow2", "--fore"], ["--foreground"]),
        (["imagofs", "info", "--json", "disk"], ["disk.qcow2"]),
    ],
)
def test_completion_in_bash(tmp_path: Path, words: list[str], expected: list[str]) -> None:
    (tmp_path / "disk.qcow2").touch()
    code = (
        'source "$1"; shift; compopt() { :; }; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '_imagofs; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    file = tmp_path / "completion"
    file.write_text(script("bash"))
    done = subprocess.run(
        ["bash", "-euc", code, "bash", file, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_everything(shell: str) -> None:
    text = imagofs("completion", shell).stdout
    for word in (*VERBS, *NAMES):
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text), word
    if (program := shutil.which(shell)) is not None:
        done = subprocess.run([program, "-n"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
