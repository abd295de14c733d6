"""`imagofs check IMAGE`: is the image consistent, and can it be repaired?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import Parser, report
from .text import FORMATS, printable

if TYPE_CHECKING:
    from ..format.qcow2.check_report import CheckResult, LostRange
    from ..format.qcow2.check_scan import Progress
    from ..storage.base import Storage

__all__ = ["main"]

#: The format cannot be checked.
NOT_SUPPORTED = 63
#: Findings and lost ranges that are printed.
_SHOWN = 100


def main(arguments: list[str]) -> int:
    """Check the image, and repair it if that is asked for."""
    parser = Parser(
        prog="imagofs check",
        description="Check the qcow2 image IMAGE. Exit code, for the state after a repair: 0 "
        "clean, 1 the check could not be completed, 2 corrupt, 3 leaked clusters only, 63 the "
        "format cannot be checked.",
    )
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "--repair",
        choices=("leaks", "all"),
        help="leaks: give back what takes room for nothing, and lose nothing; all: put everything "
        "right, and say what is lost",
    )
    parser.add_argument("--json", action="store_true", help="as qemu-img check --output=json")
    parser.add_argument("-f", "--format", choices=FORMATS, help="default: probed")
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="check the image although it is in use"
    )
    words = parser.parse_args(arguments)
    if words.repair and words.force_share:
        report("an image that is in use cannot be repaired (see 'imagofs check --help')")
        return 2
    import trio

    return trio.run(_check, words)


async def _check(words: Any) -> int:
    from ..format.qcow2.check import check_image
    from ..storage.base import StorageOpenOptions
    from ..storage.file import FileStorage

    writable = words.repair is not None
    storage = await FileStorage.open(words.image, StorageOpenOptions(writable=writable))
    async with storage:
        if not words.force_share:
            storage.lock(writable=writable)
        if (words.format or await _probe(storage)) != "qcow2":
            report(f"{words.image}: images of this format cannot be checked")
            return NOT_SUPPORTED
        with _progress(words.image, shown=not words.json) as progress:
            result = await check_image(storage, repair=words.repair, progress=progress)
        if words.json:
            print(json.dumps(_facts(words.image, result), indent=4))
        else:
            await _print(storage, result, words.repair)
    return result.exit_code


async def _probe(storage: Storage) -> str:
    from ..format import probe_format

    first = bytearray(min(4096, storage.size()))
    await storage.readv([memoryview(first)], 0)
    return probe_format(bytes(first))


def _facts(image: str, result: CheckResult) -> dict[str, Any]:
    """The result as `qemu-img check --output=json` names it: most counts only if there are any."""
    facts: dict[str, Any] = {
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "check-errors": result.check_errors,
        "filename": image,
        "format": "qcow2",
    }
    for name in (
        "corruptions",
        "leaks",
        "corruptions-fixed",
        "leaks-fixed",
        "allocated-clusters",
        "fragmented-clusters",
        "compressed-clusters",
    ):
        if number := getattr(result, name.replace("-", "_")):
            facts[name] = number
    if result.lost:
        facts["lost"] = [
            {"start": lost.guest_offset, "length": lost.length, "snapshot": lost.snapshot}
            for lost in result.lost
        ]
    if result.notes:
        facts["notes"] = list(result.notes)
    return facts


async def _print(storage: Storage, result: CheckResult, repair: str | None) -> None:
    for finding in result.findings[:_SHOWN]:
        print(printable(f"{finding.kind.value}: {finding.message}"))
    if len(result.findings) > _SHOWN:
        print(f"... and {len(result.findings) - _SHOWN} more")
    if result.findings:
        print()
    if result.corruptions_fixed or result.leaks_fixed:
        print(f"Repaired: {_counted(result.corruptions_fixed, result.leaks_fixed)}.")
    _print_losses(result.lost, result.notes, "lost, and reads as zeroes now or as the backing file")
    if result.is_clean:
        print("The image is clean.")
    else:
        print(f"Wrong: {_counted(result.corruptions, result.leaks)}.")
    if result.check_errors:
        print(f"What could not be checked: {result.check_errors}.")
    if (result.corruptions or result.check_errors) and repair != "all":
        await _print_prospects(storage)
    elif result.leaks and repair is None:
        print("Leaked clusters only take room; --repair leaks gives it back.")
    total = max(result.total_clusters, 1)
    allocated = max(result.allocated_clusters, 1)
    print(
        f"{result.allocated_clusters} of {result.total_clusters} clusters are allocated "
        f"({result.allocated_clusters / total:.2%}), of these "
        f"{result.fragmented_clusters / allocated:.2%} fragmented and "
        f"{result.compressed_clusters / allocated:.2%} compressed."
    )
    print(f"The image ends at offset {result.image_end_offset}.")


async def _print_prospects(storage: Storage) -> None:
    """Say what `--repair all` would do."""
    from ..errors import ImagofsError
    from ..format.qcow2.repair_preview import preview_repair

    try:
        result = await preview_repair(storage)
    except ImagofsError as error:
        print(f"It cannot be repaired: {printable(error.message)}.")
        return
    if result.lost or result.notes:
        print("Use --repair all to repair it. Not everything can be kept:")
        _print_losses(result.lost, result.notes, "would be lost")
    else:
        print("Use --repair all to repair it; no data would be lost.")


def _print_losses(lost: tuple[LostRange, ...], notes: tuple[str, ...], fate: str) -> None:
    for part in lost[:_SHOWN]:
        whose = "" if part.snapshot is None else f" of snapshot {part.snapshot!r}"
        print(
            printable(
                f"  {part.length} bytes at guest offset {part.guest_offset:#x}{whose}: {fate}"
            )
        )
    if len(lost) > _SHOWN:
        print(f"  ... and {len(lost) - _SHOWN} more ranges")
    for note in notes[:_SHOWN]:
        print(printable(f"  {note}"))


def _counted(corruptions: int, leaks: int) -> str:
    words = []
    if corruptions:
        words.append(f"{corruptions} corruption{'s' * (corruptions > 1)}")
    if leaks:
        words.append(f"{leaks} leaked cluster{'s' * (leaks > 1)}")
    return " and ".join(words) or "nothing that is counted"


@contextmanager
def _progress(image: str, *, shown: bool) -> Iterator[Progress | None]:
    """A progress bar on stderr, if that is a terminal and somebody can draw one."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ImportError:
        yield None
        return
    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"checking {printable(image)}", total=None)
        update: Callable[..., None] = bar.update
        yield lambda done, total: update(task, completed=done, total=total)
