"""What a run of the fuzzer came to: counts by kind, and findings, kept to be reproduced."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.bounds import SECONDS
from tests.fuzz.case import Case, Outcome, try_case
from tests.fuzz.mutate import case_of

__all__ = ["Tally", "scratch"]


def scratch() -> str | None:
    """Where cases are put: in memory, where that is possible."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


class Tally:
    """Counts, and findings.

    Args:
        found: The folder for findings.
        seconds: The bound for one image.
    """

    def __init__(self, found: Path, *, seconds: float = SECONDS) -> None:
        self.found = found
        self.seconds = seconds
        self.counts: dict[str, Counter[str]] = {}
        self.findings: Counter[str] = Counter()
        found.mkdir(parents=True, exist_ok=True)
        self._running = found / "running"
        self._work = tempfile.TemporaryDirectory(prefix="imagofs-fuzz-", dir=scratch())

    def run(self, recipe: bytes) -> Outcome:
        """Try the case of a recipe."""
        self._running.write_bytes(recipe)  # for the case that this process dies of it
        case = case_of(recipe)
        outcome = try_case(case, Path(self._work.name), seconds=self.seconds)
        count = self.counts.setdefault(case.kind, Counter())
        count["cases"] += 1
        for name, value in asdict(outcome).items():
            count[name] += bool(value)
        if outcome.finding is not None:
            self._keep(recipe, case, outcome.finding)
        return outcome

    def _keep(self, recipe: bytes, case: Case, finding: str) -> None:
        signature = _signature(finding)
        self.findings[signature] += 1
        if self.findings[signature] > 1:
            return
        folder = self.found / f"finding-{len(self.findings)}"
        folder.mkdir(exist_ok=True)
        (folder / "recipe").write_bytes(recipe)
        (folder / "why").write_text(finding)
        for name, data in case.files.items():
            (folder / name).write_bytes(data)
        if case.sizes:
            (folder / "sizes").write_text(f"to be made so long with truncate: {case.sizes}\n")

    def save(self) -> None:
        """Leave the counts for the process that began this one. It is the end."""
        self._work.cleanup()
        data = {"counts": self.counts, "findings": self.findings}
        (self.found / "tally.json").write_text(json.dumps(data))
        self._running.unlink(missing_ok=True)


def _signature(finding: str) -> str:
    """What makes two findings the same: the error, and the last lines that raised it."""
    places = re.findall(r'File "[^"]*/((?:imagofs|tests)/[^"]*)", line (\d+)', finding)
    error = [line for line in finding.strip().splitlines() if line.strip(" |+-")][-1]
    error = re.sub(r"0x[0-9a-f]+|\d+", "N", error.strip(" |"))
    return f"{error[:120]} ({', '.join(':'.join(place) for place in places[-2:])})"
