"""A hostile image with its companions, and all that is done with one: open, read, map, check,
repair, write, reopen."""

from __future__ import annotations

import os
import shutil
import stat
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from imagofs import (
    CheckResult,
    EofMapping,
    FileStorage,
    FormatAccess,
    ImagofsError,
    RawMapping,
    StorageOpenOptions,
    UnsupportedError,
    check_image,
    open_image,
)
from imagofs.format.qcow2.check_report import Kind
from imagofs.format.qcow2.loading import read_header
from imagofs.format.qcow2.repair_preview import preview_repair
from imagofs.format.qcow2.snapshots import read_snapshots
from tests.fuzz.bounds import (
    CACHES,
    MEMORY,
    REPAIR_FACTOR,
    REPAIR_MEMORY,
    SECONDS,
    Finding,
    RecordingGate,
    Stuck,
    bounded,
    collect_what_is_large,
)

__all__ = ["Case", "Outcome", "try_case"]

_PIECE = 64 << 10
_MOST = 2 << 20  # disks up to this size are read, and compared, as a whole
_MAPPINGS = 200


@dataclass(frozen=True)
class Case:
    """Files, as somebody may send them.

    Attributes:
        kind: What they were before they were changed.
        files: Contents by name; "image" is the one to open.
        sizes: Lengths of files that go on as a hole.
        format: What the image is opened as; None: probed.
    """

    kind: str
    files: dict[str, bytes]
    sizes: dict[str, int] = field(default_factory=dict)
    format: str | None = None

    def put(self, folder: Path, name: str, target: str | None = None) -> Path:
        """Make one of the files."""
        path = folder / (target or name)
        path.write_bytes(self.files[name])
        if name in self.sizes:
            os.truncate(path, max(self.sizes[name], len(self.files[name])))
        os.utime(path, ns=(0, 0))  # so that any change is seen
        return path


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        opened: It could be opened for reading.
        clean: The check had no fault to find.
        writable: It could be opened for writing.
        repaired: It was repaired.
        finding: What must not happen and did; with the traceback.
    """

    opened: bool = False
    clean: bool = False
    writable: bool = False
    repaired: bool = False
    finding: str | None = None


def try_case(
    case: Case,
    folder: Path,
    *,
    seconds: float = SECONDS,
    prepare: Callable[[Path], object] | None = None,
) -> Outcome:
    """Do everything with a case within the bounds of `bounded`.

    Args:
        case: The files.
        folder: An empty folder.
        seconds: The bound.
        prepare: Called with the folder that has the files, for what is no file.

    Never raises for what an image did: that is in the outcome's `finding`.
    """
    inside = folder / "inside"
    inside.mkdir()
    (folder / "outside").write_bytes(b"what nobody may see")
    for name in case.files:
        case.put(inside, name)
    if prepare is not None:
        prepare(inside)
    run = _Run(case, inside / "image", RecordingGate(inside))
    allowed = {str(run.image), str(run.copy)}
    try:
        for stage in (_look, _check, _repair, _write):
            limits = (seconds, MEMORY)
            if stage is _repair:
                limits = (seconds * REPAIR_FACTOR, REPAIR_MEMORY)
            with bounded(lambda: {*allowed, *run.gate.passed}, *limits):
                trio.run(stage, run)
    except (Exception, Stuck):
        run.outcome.finding = traceback.format_exc()
    finally:
        shutil.rmtree(inside)
        os.unlink(folder / "outside")
    return run.outcome


@dataclass
class _Run:
    """A case that is being tried.

    Attributes:
        case: The case.
        image: The image to open.
        gate: What the image names goes through it.
        outcome: What became of it so far.
        contents: The disk, if all of it could be read.
        damaged: The check found something that a repair could mend.
    """

    case: Case
    image: Path
    gate: RecordingGate
    outcome: Outcome = field(default_factory=Outcome)
    contents: bytes | None = None
    damaged: bool = False

    @property
    def copy(self) -> Path:
        """Where the image is repaired."""
        return self.image.with_name("repaired")

    async def open(self, *, writable: bool, snapshot: str | None = None) -> FormatAccess | None:
        """Open the image; None if that is refused."""
        collect_what_is_large()
        try:
            return await open_image(
                self.image,
                writable=writable,
                format=self.case.format,
                gate=self.gate,
                snapshot=snapshot,
                metadata_bytes=CACHES,
                inflated_bytes=CACHES,
            )
        except ImagofsError as error:
            _see(error)
            return None


def _changed(folder: Path) -> set[str]:
    """The files that were written to."""
    files = {str(path): path.lstat() for path in folder.iterdir()}
    return {name for name, it in files.items() if stat.S_ISREG(it.st_mode) and it.st_mtime_ns}


def _expect(condition: object, message: str) -> None:
    if not condition:
        raise Finding(message)


def _see(error: ImagofsError) -> None:
    """An error is one line."""
    _expect("\n" not in str(error) and len(str(error)) < 10_000, f"not one line: {error!r}")


async def _look(run: _Run) -> None:
    """Map and read what is there; all of it, if that is possible."""
    access = await run.open(writable=False)
    if access is not None:
        run.outcome.opened = True
        async with access:
            for layer in access.layers():
                layer.details()
            await _map(access)
            run.contents = await _read(access)
        if access.format_name == "qcow2":
            await _snapshots(run)
    _expect(not _changed(run.image.parent), f"reading changed {_changed(run.image.parent)}")


async def _map(access: FormatAccess) -> None:
    size, position = access.size(), 0
    for _ in range(_MAPPINGS):
        try:
            mapping = await access.get_mapping(position, max(size - position, 1))
            await access.get_shallow_mapping(position, max(size - position, 1))
        except ImagofsError as error:
            _see(error)
            position += 1 << 16
            continue
        if isinstance(mapping, EofMapping):
            _expect(position >= size, f"the end at {position} of {size}")
            return
        _expect(0 < mapping.length <= size - position, f"{mapping} at {position} of {size}")
        if isinstance(mapping, RawMapping):
            _expect(not mapping.writable, f"{mapping} of a read-only image")
        position += mapping.length


async def _read(access: FormatAccess) -> bytes | None:
    """All of a small disk; parts of a large one."""
    size = access.size()
    if size <= _MOST:
        places = [(at, min(_PIECE, size - at)) for at in range(0, size, _PIECE)]
    else:
        wanted = (0, _PIECE * 3 + 77, size // 3, size // 2 - 1, size - _PIECE - 5, size - 513)
        places = [(at, min(_PIECE, size - at)) for at in wanted]
    parts, failed = [], size > _MOST
    for at, length in places:
        twice = []
        for _ in range(2):
            buffer = bytearray(length)
            try:
                await access.read(buffer, at)
                twice.append(bytes(buffer))
            except ImagofsError as error:
                _see(error)
                failed = True
        _expect(len(set(twice)) < 2, f"two reads at {at} differ")
        parts += twice[:1]
    return None if failed else b"".join(parts)


async def _snapshots(run: _Run) -> None:
    async with await FileStorage.open(run.image) as storage:
        try:
            table = await read_snapshots(storage, await read_header(storage))
            names = [snapshot.id for snapshot in table[:2]]
            del table
        except ImagofsError as error:
            _see(error)
            return
    for name in names:
        await _look_at_snapshot(run, name)


async def _look_at_snapshot(run: _Run, name: str) -> None:
    access = await run.open(writable=False, snapshot=name)
    if access is not None:
        async with access:
            await _map(access)
            await _read(access)


async def _check(run: _Run) -> None:
    result = await _result_of_check(run.image)
    if isinstance(result, CheckResult):
        run.damaged = result.exit_code != 0
        run.outcome.clean = not run.damaged and run.case.format != "raw"
    _expect(not _changed(run.image.parent), "a check changed a file")


async def _result_of_check(image: Path) -> CheckResult | ImagofsError:
    async with await FileStorage.open(image) as storage:
        try:
            return await check_image(storage)
        except ImagofsError as error:
            _see(error)
            return error


async def _repair(run: _Run) -> None:
    """Repair a copy: it is clean afterwards, or the repair was refused."""
    if not run.damaged:
        return
    async with await FileStorage.open(run.image) as storage:
        try:
            await preview_repair(storage)
        except ImagofsError as error:
            _see(error)
    _expect(not _changed(run.image.parent), "a preview changed a file")
    run.case.put(run.image.parent, "image", run.copy.name)
    async with await FileStorage.open(run.copy, StorageOpenOptions(writable=True)) as storage:
        try:
            result = await check_image(storage, repair="all")
        except ImagofsError as error:
            _see(error)
            return
        again = await check_image(storage)
    run.outcome.repaired = True
    _expect(again.exit_code == result.exit_code == 0, f"not clean after a repair: {again.findings}")


async def _write(run: _Run) -> None:
    """Change the image. What was clean stays so, and has what was written."""
    run.copy.unlink(missing_ok=True)
    size = run.image.stat().st_size
    access = await run.open(writable=True)
    if access is None:
        return
    run.outcome.writable = True
    model = bytearray(run.contents) if run.outcome.clean and run.contents is not None else None
    try:
        async with access:
            if not await _change(access, model):
                model = None
            if model is not None:
                _expect(await _read(access) == bytes(model), "another read than what was written")
    except ImagofsError as error:
        _see(error)
        model = None
    if run.outcome.clean:
        await _is_still_clean(run.image, size)
    if model is not None:
        access = await run.open(writable=False)
        _expect(access is not None, "not to be opened after writing")
        assert access is not None
        async with access:
            _expect(await _read(access) == bytes(model), "what was written is not there")
    changed = _changed(run.image.parent) - {str(run.image), *run.gate.writable}
    _expect(not changed, f"writing changed {changed}")


async def _is_still_clean(image: Path, old_size: int) -> None:
    result = await _result_of_check(image)
    if isinstance(result, ImagofsError):
        raise Finding("not to be checked after writing") from result
    # Counts behind the end of the file are not looked at before it grows.
    leaks = [
        finding
        for finding in result.findings
        if finding.kind is Kind.LEAK and (finding.host_offset or 0) < old_size
    ]
    worse = result.corruptions or result.check_errors or leaks
    _expect(not worse, f"no longer clean after writing: {result.findings}")


async def _change(access: FormatAccess, model: bytearray | None) -> bool:
    """Write, zero, discard; whether all of it was done."""
    size, done = access.size(), True
    changes = (
        ("write", 0, 3),
        ("write", size // 3 & -_PIECE, _PIECE),
        ("write", size // 2 + 11, 5000),
        ("zero", size // 4 + 100, 70_000),
        ("write", size - 9, 9),
        ("discard", size // 8, 30_000),
        ("flush", 0, 0),
        ("write", size // 8 + 4096, 9000),
        ("discard", size // 2 & -_PIECE, _PIECE * 2),
        ("sync", 0, 0),
        ("zero", 0, size // 16),
        ("write", size * 2 // 3, 40_000),
    )
    for number, (what, at, length) in enumerate(changes, 1):
        at = max(at, 0)
        length = max(0, min(length, size - at, 1 << 30))
        data = bytes([number]) * min(length, _PIECE)
        try:
            if what == "write":
                await access.write(data, at)
            elif what == "zero":
                await access.write_zeroes(at, length)
            elif what == "discard":
                await access.discard_to_zero(at, length)
            elif what == "flush":
                await access.flush()
            else:
                await access.sync()
        except UnsupportedError as error:
            _see(error)  # nothing was done
            continue
        except ImagofsError as error:
            _see(error)
            done = False
            continue
        if model is not None:
            model[at : at + length] = data if what == "write" else bytes(length)
    return done
