"""`imagofs stat MOUNTPOINT`: what a mount has done so far, once or again and again."""

from __future__ import annotations

import argparse
import errno
import json
import sys
import time
from itertools import pairwise
from typing import Any

from ..errors import StorageError
from ..fuse import client, mounts
from . import Parser
from .text import format_size, printable

__all__ = ["lines", "main"]


def main(arguments: list[str]) -> int:
    """Show the statistics."""
    parser = Parser(
        prog="imagofs stat",
        description="Show what a mount has done so far: requests, bytes, latencies, how many were "
        "answered without waiting for the image, how many wait now.",
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("--json", action="store_true", help="as JSON: sizes in bytes, seconds")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=1.0,
        metavar="SECONDS",
        help="again and again until Ctrl-C, with rates (default: every second); on a terminal in "
        "one place, with --json one line each",
    )
    words = parser.parse_args(_seconds_given(arguments))
    point = mounts.real_path(words.mountpoint)
    figures = _ask(point)
    if words.watch is None:
        print(json.dumps(figures, indent=2) if words.json else "\n".join(lines(figures)))
        return 0
    _watch(point, words.watch, as_json=words.json)
    return 0


def _seconds_given(arguments: list[str]) -> list[str]:
    """The same words, but --watch never takes the mountpoint behind it for its seconds."""
    words = list(arguments)
    for index, (word, following) in enumerate(pairwise(arguments)):
        if word == "--":
            break
        if word == "--watch" and not _is_number(following):
            words[index] = "--watch=1"
    return words


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _seconds(text: str) -> float:
    if not (_is_number(text) and 0.05 <= float(text) <= 86400):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0.05 to 86400")
    return float(text)


def _watch(point: str, seconds: float, *, as_json: bool) -> None:
    """Show the figures again and again until Ctrl-C, or until the mount is gone."""
    before: dict[str, Any] | None = None
    height = 0
    try:
        while True:
            figures = _ask(point)
            if as_json:
                print(json.dumps(figures), flush=True)
            else:
                shown = lines(figures, before)
                # On a terminal: up to where it began, and each line cleared behind its end.
                start = f"\x1b[{height}A" if height and sys.stdout.isatty() else ""
                end = "\x1b[K\n" if sys.stdout.isatty() else "\n"
                print(start + "".join(line + end for line in shown), end="", flush=True)
                height = len(shown)
            before = figures
            time.sleep(seconds)
    except KeyboardInterrupt:
        return


def _ask(point: str) -> dict[str, Any]:
    mount = mounts.find_at(point)
    if mount is None or mount.fstype != mounts.FSTYPE:
        raise StorageError("imagofs has mounted nothing here", error=errno.EINVAL, filename=point)
    try:
        return client.statistics(point)
    except OSError as error:
        raise StorageError.of("ask the daemon", error, point) from error


def lines(figures: dict[str, Any], before: dict[str, Any] | None = None) -> list[str]:
    """The figures for people; with earlier ones also how much there was each second since."""
    mode = "read-write" if figures["writable"] else "read-only"
    rows = [
        ("image", f"{printable(figures['image'])} ({figures['format']}, {mode})"),
        ("layers", str(figures["layers"])),
        ("process", f"{figures['process']}, up {figures['uptime']:.0f} s"),
        ("size", format_size(figures["size"])),
        ("on the host", _grown(figures)),
    ]
    if "reads" in figures:
        for name in ("read", "write"):
            number, size = figures[f"{name}s"], figures[f"{name}_bytes"]
            cached = figures[f"cached_{name}s"] / number if number else 0.0
            text = f"{number}, {format_size(size)}, {cached:.0%} without waiting"
            if before is not None and figures["uptime"] > before["uptime"]:
                seconds = figures["uptime"] - before["uptime"]
                text += f"; now {(number - before[f'{name}s']) / seconds:.0f}/s, "
                text += f"{format_size(round((size - before[f'{name}_bytes']) / seconds))}/s"
            rows.append((f"{name}s", text))
        rows += [
            ("others", str(figures["other_requests"])),
            ("waiting", f"{figures['queue_depth']} (at most {figures['queue_depth_max']})"),
            (
                "latency",
                f"p50 {_time(figures['latency_p50'])}, p99 {_time(figures['latency_p99'])}",
            ),
        ]
        if seconds := figures.get("awake_seconds"):  # older daemons have none
            rows.append(("processors", f"kept awake for {seconds:.1f} s"))
    return [f"{name + ':':<13}{text}" for name, text in rows]


def _grown(figures: dict[str, Any]) -> str:
    text = format_size(figures["allocated"])
    if clusters := figures.get("clusters_allocated"):
        text += f", {clusters} clusters of {format_size(figures['cluster_size'])} since the mount"
    return text


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
