"""Changes to the qcow2 write path that its tests must notice.

Each mutant is a small change that breaks a rule: a barrier dropped, two steps swapped, a refcount
skipped, a bound moved. The script applies them one by one to a copy of the tree and runs the tests
that should fail.

    python -m tests.trust.mutants               # all
    python -m tests.trust.mutants snapshot      # those whose description contains a word
    python -m tests.trust.mutants --everything  # all suites for each, not only its own
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("imagofs/format/qcow2")

#: Test files by the short name that a mutant uses.
SUITES = {
    "crash": "tests/trust/test_crash.py",
    "races": "tests/trust/test_races.py",
    "walk": "tests/trust/test_walk.py",
    "interrupted": "tests/trust/test_interrupted.py",
    "faults": "tests/trust/test_faults.py",
    "resize_races": "tests/trust/test_resize_races.py",
    "allocation": "tests/qcow2/test_allocation.py",
    "small_caches": "tests/qcow2/test_small_caches.py",
    "file": "tests/storage/test_file.py",
}


class Mutant(NamedTuple):
    """One change.

    Attributes:
        suite: The test file that notices it, a key of `SUITES`.
        breaks: What goes wrong.
        file: Its name, from `FOLDER` on.
        old: What is replaced; it is there once.
        new: What it is replaced with.
    """

    suite: str
    breaks: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant(
        "crash",
        "L2 slices are written before guest data and refcounts are durable",
        "metadata.py",
        """\
            await self._sync_around([*cut.slices, *cut.l1], again=again)
""",
        """\
            await self._write_all([*cut.slices, *cut.l1])
            if again:
                await self._sync()
""",
    ),
    Mutant(
        "crash",
        "L2 slices are not durable when a sync returns",
        "metadata.py",
        """\
            await self._sync_around([*cut.slices, *cut.l1], again=again)
""",
        """\
            await self._sync_around([*cut.slices, *cut.l1], again=False)
""",
    ),
    Mutant(
        "file",
        "a file is written before what comes first is durable",
        "../../storage/file.py",
        """\
        self._fdatasync()
        for offset, data in writes:
""",
        """\
        for offset, data in writes:
""",
    ),
    Mutant(
        "file",
        "a file's last writes are not synced",
        "../../storage/file.py",
        """\
        if again:
            self._fdatasync()
""",
        "",
    ),
    Mutant(
        "crash",
        "clusters are freed before the dereference is durable",
        "metadata.py",
        """\
        again = durable or bool(cut.dropped)
""",
        """\
        again = durable
""",
    ),
    Mutant(
        "crash",
        "a new refcount block is in the table before it is durable",
        "metadata.py",
        """\
            await self._write_all(cut.new_blocks)
            await self._sync()
""",
        """\
            await self._write_all(cut.new_blocks)
""",
    ),
    Mutant(
        "crash",
        "two steps of the flush are swapped",
        "metadata.py",
        """\
        await self._write_all(cut.blocks)
        again = durable or bool(cut.dropped)
        if cut.slices or cut.l1:
            await self._sync_around([*cut.slices, *cut.l1], again=again)
        elif again:
            await self._sync()
""",
        """\
        again = durable or bool(cut.dropped)
        if cut.slices or cut.l1:
            await self._sync_around([*cut.slices, *cut.l1], again=again)
        elif again:
            await self._sync()
        await self._write_all(cut.blocks)
""",
    ),
    Mutant(
        "races",
        "a freed cluster is reused under a running read",
        "metadata.py",
        """\
        await self.epochs.wait_for_earlier()
        by_block""",
        "        by_block",
    ),
    Mutant(
        "crash",
        "a flush that was cancelled forgets what it had to write",
        "metadata.py",
        """\
            self._put_back(cut)
            raise""",
        "            raise",
    ),
    Mutant(
        "crash",
        "a flush that was cancelled forgets what it had to free",
        "metadata.py",
        """\
        refcounts.dropped.update(cut.dropped)
""",
        "",
    ),
    Mutant(
        "crash",
        "the external data file is not synced",
        "metadata.py",
        """\
            if self.data_storage is not self.storage:
                await self.data_storage.sync()
        except ImagofsError as exc:
            self._lose_sync(exc)
        try:
""",
        "",
    ),
    Mutant(
        "crash",
        "the header refers to a refcount table that is not durable",
        "metadata.py",
        """\
        await self.write(first + blocks << bits, to_big_endian(table))
        await self._sync()
""",
        """\
        await self.write(first + blocks << bits, to_big_endian(table))
""",
    ),
    Mutant(
        "crash",
        "a sync joins a flush that began before it",
        "metadata.py",
        """\
            covers = self._asked
            await self._flush(durable=durable)
""",
        """\
            await self._flush(durable=durable)
            covers = self._asked
""",
    ),
    Mutant(
        "crash",
        "a copied L2 table keeps its old refcount",
        "writing.py",
        """\
                refcounts.dropped[old >> self._cluster_bits] += 1
""",
        """\
                pass
""",
    ),
    Mutant(
        "crash",
        "a mapping is entered before its data is written",
        "writing.py",
        """\
            await self._write_pieces(plan, views, guest_offset)
            await self._commit_when_cached(plan)
""",
        """\
            await self._commit_when_cached(plan)
            await self._write_pieces(plan, views, guest_offset)
""",
    ),
    Mutant(
        "crash",
        "a write that failed keeps its clusters",
        "planning.py",
        """\
        self._refcounts.give_back(plan.allocated)
""",
        """\
        pass
""",
    ),
    Mutant(
        "crash",
        "a reused cluster is taken for one that reads as zero",
        "refcounts.py",
        """\
        virgin = first >= self._virgin
""",
        """\
        virgin = True
""",
    ),
    Mutant(
        "crash",
        "one cluster too many is taken for one that reads as zero",
        "refcounts.py",
        """\
        virgin = first >= self._virgin
""",
        """\
        virgin = first >= self._virgin - 1
""",
    ),
    Mutant(
        "crash",
        "the last cluster of a run is not counted",
        "refcounts.py",
        """\
        self._change_run(first, count, 1)
""",
        """\
        self._change_run(first, count - 1 or 1, 1)
""",
    ),
    Mutant(
        "crash",
        "a reference is taken off before that is durable",
        "planning.py",
        """\
        if plan.dropped:
            self._refcounts.dropped.update(plan.dropped)
""",
        """\
        for c in plan.dropped:
            self._refcounts._change(c, self._refcounts.get(c) - 1)
            if not self._refcounts.get(c):
                self._refcounts._note_free(c)
""",
    ),
    Mutant(
        "crash",
        "a compressed cluster drops one of two references",
        "planning.py",
        """\
            clusters = list(range(first, last + 1))
""",
        """\
            clusters = [first]
""",
    ),
    Mutant(
        "crash",
        "old bytes around a write into a zero cluster show up",
        "planning.py",
        """\
            head, tail = old.guest_offset, cluster_end
            entry, bitmap = old.entry & ~READS_AS_ZERO, 0
""",
        """\
            head, tail = start, stop
            entry, bitmap = old.entry & ~READS_AS_ZERO, 0
""",
    ),
    Mutant(
        "crash",
        "a cluster that a snapshot shares is written in place",
        "planning.py",
        """\
            old.entry & COPIED
            and old.host_offset
""",
        """\
            old.host_offset
""",
    ),
    Mutant(
        "crash",
        "an L2 table that a snapshot shares is changed in place",
        "l2.py",
        """\
        return bool(entry & COPIED and entry & OFFSET_MASK)
""",
        """\
        return bool(entry & OFFSET_MASK)
""",
    ),
    Mutant(
        "walk",
        "the resolved map keeps an old mapping",
        "writing.py",
        """\
            self._driver.mapping_changed(first, end - first)
""",
        """\
            pass
""",
    ),
    Mutant(
        "crash",
        "writes to one cluster do not wait for each other",
        "writing.py",
        """\
        async with self._driver.locks.hold(*self._clusters(guest_offset, end)):
            while guest_offset < end:
""",
        """\
        if True:
            while guest_offset < end:
""",
    ),
    Mutant(
        "crash",
        "a lock is not rounded to whole clusters",
        "writing.py",
        """\
        return start // size * size, -(-stop // size) * size
""",
        """\
        return start, stop
""",
    ),
    Mutant(
        "crash",
        "one subcluster too many is copied over new data",
        "planning.py",
        """\
            if not first <= number <= last and old.bitmap >> number & 1:
""",
        """\
            if not first <= number <= last + 1 and old.bitmap >> number & 1:
""",
    ),
    Mutant(
        "crash",
        "a discard to zero lets the backing file show",
        "planning.py",
        """\
                entry, bitmap = keep | READS_AS_ZERO, 0
""",
        """\
                entry, bitmap = keep, 0
""",
    ),
    Mutant(
        "races",
        "a table that was read before a flush is kept after it",
        "metadata.py",
        """\
        self.refcounts.flushes += 1
        self.l2.flushes += 1
""",
        "",
    ),
    Mutant(
        "crash",
        "a discard takes the clusters at its edges",
        "writing.py",
        """\
        return -(-start // unit) * unit, last * unit
""",
        """\
        return start // unit * unit, last * unit
""",
    ),
    Mutant(
        "walk",
        "the last, partial cluster of the disk is not discarded",
        "writing.py",
        """\
        last = -(-stop // unit) if stop == self._driver.reach else stop // unit
""",
        """\
        last = stop // unit
""",
    ),
    Mutant(
        "interrupted",
        "a sync after a failed one is reported as success",
        "metadata.py",
        """\
        if self.lost is not None:
            raise SyncLostError(self.lost""",
        """\
        if self.lost is not None and False:
            raise SyncLostError(self.lost""",
    ),
    Mutant(
        "races",
        "writes in place go on after a failed sync",
        "metadata.py",
        """\
        if self.on_lost is not None:
            self.on_lost()
""",
        "",
    ),
    Mutant(
        "crash",
        "a data file is punched before its mapping is gone",
        "writing.py",
        """\
            await self._metadata.flush(durable=True)
            await self._metadata.epochs""",
        "            await self._metadata.epochs",
    ),
    Mutant(
        "races",
        "a data file is punched under a running read",
        "writing.py",
        """\
            await self._metadata.epochs.wait_for_earlier()
            length""",
        "            length",
    ),
    Mutant(
        "allocation",
        "the last changed sector of a refcount block is not written",
        "refcounts.py",
        """\
        last_sector = (within + number - 1) * self._bits // 8 // _SECTOR
""",
        """\
        last_sector = first_sector
""",
    ),
    Mutant(
        "crash",
        "a new L2 table is not marked as ours",
        "l2.py",
        """\
        self.l1[index] = host_offset | COPIED
""",
        """\
        self.l1[index] = host_offset
""",
    ),
    Mutant(
        "walk",
        "a part of a new cluster hides what the backing file has around it",
        "planning.py",
        """\
        if self._has_backing and (start | end) & mask:
""",
        """\
        if self._has_backing and start & mask:
""",
    ),
    Mutant(
        "walk",
        "the edges of a new cluster show what the host had there",
        "planning.py",
        """\
            if not virgin:
                plan.add(tail, tail + shift, stop - tail, Source.ZERO)
""",
        "",
    ),
    Mutant(
        "allocation",
        "what lies between changed parts of a table is zeroed",
        "l2.py",
        """\
        data = self._storage.read_table_nowait(length, place) if numbers[1:] else bytearray(size)
""",
        """\
        data = bytearray(length)
""",
    ),
    Mutant(
        "crash",
        "parts of two tables are written together, with what lies between them",
        "l2.py",
        """\
            same_table = not (number ^ last) >> self._slices_per_table_bits
""",
        """\
            same_table = last >= 0
""",
    ),
    Mutant(
        "crash",
        "the old refcount table is never freed",
        "metadata.py",
        """\
        refcounts.dropped.update(range(old_first, old_first + old_clusters))
""",
        "",
    ),
    Mutant(
        "crash",
        "a change goes to a copy of a slice",
        "l2.py",
        """\
            table = self.dirty[number] = self.need_slice(number)
""",
        """\
            table = self.dirty[number] = self.need_slice(number)[:]
""",
    ),
    Mutant(
        "crash",
        "a refcount block is in the table before it is written",
        "metadata.py",
        """\
            await self._write_all(cut.new_blocks)
            await self._sync()
            await self._write_all(cut.reftable)
""",
        """\
            await self._write_all(cut.reftable)
            await self._sync()
            await self._write_all(cut.new_blocks)
""",
    ),
    Mutant(
        "crash",
        "a write that was cancelled keeps its clusters",
        "writing.py",
        """\
        except BaseException:
            self._planner.give_up(plan)
            raise

    async def _write_pieces""",
        """\
        except Exception:
            self._planner.give_up(plan)
            raise

    async def _write_pieces""",
    ),
    Mutant(
        "allocation",
        "the block of a freed cluster is not loaded again",
        "refcounts.py",
        """\
            held.append(self._need_block(first >> self.block_bits))
            used_free += 1
""",
        """\
            used_free += 1
""",
    ),
    Mutant(
        "allocation",
        "two freed neighbours are one run though two blocks count them",
        "refcounts.py",
        "        if cluster & self._block_entries - 1 and self._free and",
        "        if self._free and",
    ),
    Mutant(
        "allocation",
        "a block is made over metadata that nobody counts",
        "refcounts.py",
        """\
        if not self.table[index] and index << self.block_bits in self._own:
            return True
""",
        "",
    ),
    Mutant(
        "allocation",
        "metadata loses its last reference",
        "planning.py",
        """\
            if cluster in self._metadata.own:
                raise self._wrong(old)
""",
        "",
    ),
    Mutant(
        "allocation",
        "clusters of a longer L1 table count as never used",
        "refcounts.py",
        """\
        self._take(first, number)
        self.take_virgin(first, number)
""",
        """\
        self._take(first, number)
""",
    ),
    Mutant(
        "resize_races",
        "a disk becomes smaller under requests that were let in before",
        "resizing.py",
        """\
        await driver.changes.wait_for_earlier()
""",
        "",
    ),
    Mutant(
        "faults",
        "a write that failed is reported as success",
        "metadata.py",
        """\
        for place, data in changes:
            await self.write(place, data)
""",
        """\
        for place, data in changes:
            try:
                await self.write(place, data)
            except ImagofsError:
                pass
""",
    ),
    Mutant(
        "faults",
        "a flush that failed forgets what it had to write",
        "metadata.py",
        """\
            self._put_back(cut)
            raise""",
        "            raise",
    ),
    Mutant(
        "small_caches",
        "tables that are needed together push each other out",
        "writing.py",
        """\
                held.append(await missing.load())
""",
        """\
                await missing.load()
""",
    ),
)


def run_tests(tree: Path, suites: list[str]) -> int:
    """The exit code of pytest: 0 if all passed, 1 if tests failed and nothing else did."""
    # The same seeds each time: a mutant that is noticed once is noticed always.
    seeds = {"IMAGOFS_CRASH_SEED": "11", "IMAGOFS_WALK_SEED": "77", "IMAGOFS_CONCURRENCY_SEED": "5"}
    seeds |= {"IMAGOFS_FAULTS_SEED": "3", "IMAGOFS_RESIZE_SEED": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *suites]
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, **seeds}, capture_output=True, timeout=1200
    )
    return done.returncode


def is_noticed(mutant: Mutant, tree: Path, *, everything: bool) -> bool:
    """Apply a mutant to a tree, run tests, undo it."""
    path = tree / FOLDER / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.breaks}: {mutant.file} has changed"
    path.write_text(text.replace(mutant.old, mutant.new))
    suites = list(SUITES.values()) if everything else [SUITES[mutant.suite]]
    try:
        return run_tests(tree, suites) == 1
    finally:
        path.write_text(text)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="See that the tests notice broken code.")
    parser.add_argument("words", nargs="*", help="only mutants whose description has one of these")
    parser.add_argument("--everything", action="store_true", help="run all suites for each")
    arguments = parser.parse_args()
    missed = tried = 0
    with tempfile.TemporaryDirectory(prefix="imagofs-mutants-") as name:
        tree = Path(name) / "tree"
        for part in ("imagofs", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            (tree / part).parent.mkdir(exist_ok=True)
            copy(ROOT / part, tree / part)
        if run_tests(tree, list(SUITES.values())):
            print("the tests fail on the code as it is: they would notice anything")
            return 1
        for mutant in MUTANTS:
            if arguments.words and not any(word in mutant.breaks for word in arguments.words):
                continue
            began = time.perf_counter()
            noticed = is_noticed(mutant, tree, everything=arguments.everything)
            tried += 1
            missed += not noticed
            verdict = "noticed" if noticed else "MISSED "
            print(f"{verdict} {mutant.breaks} ({time.perf_counter() - began:.0f} s)", flush=True)
    print(f"{tried} mutants, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
