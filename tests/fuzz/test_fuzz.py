"""Hostile images: a little of what `make fuzz` does, and that it would see what must not happen."""

from __future__ import annotations

import gc
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import bounds, tally
from tests.fuzz.bounds import Finding, Stuck, bounded
from tests.fuzz.case import Case, Outcome, try_case
from tests.fuzz.mutate import case_of, corpus
from tests.fuzz.seeds import KINDS, seed


def tried(case: Case) -> Outcome:
    with tempfile.TemporaryDirectory(dir=tally.scratch()) as folder:
        return try_case(case, Path(folder))


@settings(max_examples=120)
@given(recipe=st.binary(max_size=96))
def test_any_recipe(recipe: bytes):
    outcome = tried(case_of(recipe))
    assert outcome.finding is None, outcome.finding


def test_recipes_of_the_corpus():
    """Some of them, others each time."""
    for recipe in random.sample(corpus(), 50):
        outcome = tried(case_of(recipe))
        assert outcome.finding is None, f"{recipe.hex()}: {outcome.finding}"


@pytest.mark.parametrize("kind", KINDS)
def test_good_images_pass_through_all_of_it(kind: str):
    """Else nothing that is done to them would mean much."""
    outcome = tried(Case(kind, seed(kind)))
    assert outcome.finding is None, outcome.finding
    assert outcome.opened and outcome.clean == kind.startswith("qcow2")
    assert outcome.writable == (kind.startswith("qcow2") or kind == "vmdk-flat")


# --- the bounds are awake -------------------------------------------------------------------------


def test_time_memory_and_files_are_watched(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    allowed = {str(tmp_path / "file")}
    gc.collect()  # other tests leave up to 100 MiB, which would hide what is taken here
    with bounded(lambda: allowed):
        (tmp_path / "file").read_bytes()
        bytearray(60 << 20)
    for _ in range(2):
        with pytest.raises(Finding, match="MiB of memory"), bounded(lambda: allowed):
            bytearray(80 << 20)
    with pytest.raises(Finding, match="nobody allowed"), bounded(set):
        (tmp_path / "file").read_bytes()
    with pytest.raises(Finding, match="nobody allowed"), bounded(lambda: allowed):
        os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(Finding, match="Popen"), bounded(lambda: allowed):
        subprocess.run(["true"], check=True)
    with pytest.raises(Stuck), bounded(lambda: allowed, 0.05):
        while True:
            pass


def test_memory_freed_before_hides_nothing():
    """malloc keeps it, in the process's size, and would give it out again."""
    pieces = [bytearray(100 << 10) for _ in range(1000)]
    above = bytearray(100 << 10)  # else it would go back to the system
    pieces.clear()
    with pytest.raises(Finding, match="MiB of memory"), bounded(set):
        pieces.extend(bytearray(100 << 10) for _ in range(800))
    del above


def test_a_slow_machine_gets_more_time(monkeypatch: pytest.MonkeyPatch):
    assert 1 <= bounds.slowness() <= 10
    monkeypatch.setattr(bounds, "slowness", lambda: 3.0)
    began = time.process_time()
    with bounded(set, 0.1):
        while time.process_time() - began < 0.2:
            pass
    began = time.process_time()
    with pytest.raises(Stuck, match="too much processor time"), bounded(set, 0.1):
        while True:
            pass
    assert time.process_time() - began > 0.29


def test_changes_of_other_files_are_seen(monkeypatch: pytest.MonkeyPatch):
    from tests.fuzz import case

    async def clumsy(run: Any) -> None:
        await original(run)
        run.image.with_name("base").write_bytes(b"")
        await original(run)

    original = case._look
    monkeypatch.setattr(case, "_look", clumsy)
    outcome = tried(Case("qcow2-chain", seed("qcow2-chain")))
    assert outcome.finding is not None and "reading changed" in outcome.finding


# --- the command ----------------------------------------------------------------------------------


def test_the_command_counts_what_it_tried(tmp_path: Path):
    words = [
        "-m",
        "tests.fuzz",
        "--plain",
        "--seconds",
        "0.5",
        "--seed",
        "7",
        "--found",
        str(tmp_path),
    ]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"seed 7: [1-9]\d* cases, \d+ accepted, \d+ refused, 0 kinds", done.stdout)


def test_a_finding_is_kept_with_what_reproduces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tally, "try_case", lambda *_, **how: Outcome(finding="broken at 17"))
    counted = tally.Tally(tmp_path)
    for recipe in (b"", b"\5\3"):
        counted.run(recipe)
    counted.save()
    assert list(counted.findings.values()) == [2]
    [folder] = tmp_path.glob("finding-*")
    assert case_of((folder / "recipe").read_bytes()) == case_of(b"")
    assert (folder / "image").read_bytes() == case_of(b"").files["image"]
    assert (folder / "why").read_text() == "broken at 17"
