"""qemu-img and qemu-io: the oracle of the tests.

Plain functions that raise `AssertionError` with the tool's whole output when it fails, so that a
broken image shows its reason in the test's report. Images are made small and in a test's own
`tmp_path`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 60.0


def run(*argv: str | Path, ok: Iterable[int] = (0,), timeout: float = TIMEOUT_SECONDS) -> str:
    """Run a program to its end and return its standard output.

    Args:
        argv: The program and its arguments.
        ok: Exit codes that are no failure.
        timeout: Seconds that it may take.

    Raises:
        AssertionError: It exited with another code; the message holds all that it printed.
    """
    command = [str(word) for word in argv]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
    )
    if done.returncode not in ok:
        raise AssertionError(
            f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def qemu_img(*arguments: str | Path, ok: Iterable[int] = (0,)) -> str:
    """Run `qemu-img ARGUMENTS...` and return what it printed."""
    return run("qemu-img", *arguments, ok=ok)


def qemu_io(image: Path, *commands: str, fmt: str = "qcow2", read_only: bool = False) -> str:
    """Run qemu-io commands such as `write -P 7 64k 512`; a `read -P` that differs is a failure."""
    words = [word for command in commands for word in ("-c", command)]
    mode = ["-r"] if read_only else []
    output = run("qemu-io", "-f", fmt, *mode, *words, image)
    # Some versions of qemu-io exit with 0 although a pattern differed or a command failed.
    for complaint in ("Pattern verification failed", "failed:", "command not found"):
        assert complaint not in output, output
    return output


def create(
    path: Path,
    size: int | str | None = None,
    *,
    fmt: str = "qcow2",
    backing: Path | str | None = None,
    backing_fmt: str | None = "qcow2",
    writes: Iterable[str] = (),
    **options: str | int | bool,
) -> Path:
    """Make an image with `qemu-img create`, and run qemu-io commands on it.

    Args:
        path: The file to make.
        size: Virtual size in bytes, or with qemu's suffixes; None takes the backing file's.
        fmt: The image's format.
        backing: Name of the backing file, kept in the image as it is given here.
        backing_fmt: Its format; None leaves it out of the image (only qemu-img before 6.1
            accepts that for qcow2, so edit the header for such an image).
        writes: qemu-io commands, e.g. `write -P 1 0 64k`.
        options: Creation options, `cluster_size=512` as `-o cluster_size=512`.
    """
    words: list[str | Path] = ["create", "-q", "-f", fmt]
    for name, value in options.items():
        if isinstance(value, bool):
            value = "on" if value else "off"
        words += ["-o", f"{name}={value}"]
    if backing is not None:
        words += ["-b", str(backing)]
        if backing_fmt is not None:
            words += ["-F", backing_fmt]
    words.append(path)
    if size is not None:
        words.append(str(size))
    qemu_img(*words)
    commands = list(writes)
    if commands:
        qemu_io(path, *commands, fmt=fmt)
    return path


def info(image: Path | str, fmt: str | None = None) -> dict[str, Any]:
    """What `qemu-img info --output=json` says of an image, without taking a lock."""
    words = ["-f", fmt] if fmt else []
    return _of_the_image(json.loads(qemu_img("info", "-U", "--output=json", *words, image)))


def chain_info(image: Path | str) -> list[dict[str, Any]]:
    """The same of each image of a chain, the top one first."""
    words = ["info", "-U", "--output=json", "--backing-chain"]
    return [_of_the_image(found) for found in json.loads(qemu_img(*words, image))]


def _of_the_image(found: dict[str, Any]) -> dict[str, Any]:
    found.pop("children", None)  # newer ones tell of the layers below the format too
    return found


def contents(image: Path, fmt: str = "qcow2") -> bytes:
    """The guest's disk, as qemu reads it through the whole chain."""
    flat = image.with_name(image.name + ".flat")
    try:
        qemu_img("convert", "-U", "-f", fmt, "-O", "raw", image, flat)
        return flat.read_bytes()
    finally:
        flat.unlink(missing_ok=True)


def check(image: Path, *, leaks: bool = False) -> dict[str, Any]:
    """`qemu-img check`, which must find no error, and no leak unless `leaks` allows them.

    Returns:
        The report. Keys whose count is 0 are left out of it by qemu-img.
    """
    ok = (0, 3) if leaks else (0,)
    report: dict[str, Any] = json.loads(
        qemu_img("check", "-U", "-f", "qcow2", "--output=json", image, ok=ok)
    )
    assert not report.get("corruptions") and not report.get("check-errors"), report
    assert leaks or not report.get("leaks"), report
    return report
