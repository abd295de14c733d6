"""`make fuzz`: hostile images, minutes of them. Half of the time by chance, half led by atheris."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.case import try_case
from tests.fuzz.mutate import case_of
from tests.fuzz.tally import scratch

_COLUMNS = ("cases", "opened", "clean", "repaired", "writable", "finding")


def _reproduce(recipes: list[str]) -> int:
    """Try recipes again, given as files or in hexadecimal."""
    bad = 0
    for word in recipes:
        recipe = Path(word).read_bytes() if Path(word).exists() else bytes.fromhex(word)
        with tempfile.TemporaryDirectory(dir=scratch()) as folder:
            case = case_of(recipe)
            outcome = try_case(case, Path(folder))
        print(f"{word}: {case.kind}, format {case.format}, {outcome}")
        print(outcome.finding or "nothing to find")
        bad += outcome.finding is not None
    return bad


def _work(mode: str, seed: int, seconds: float, found: Path) -> tuple[dict[str, Counter[str]], int]:
    """Let a process of its own try cases; its counts, and how many kinds of findings it has."""
    words = [sys.executable, "-m", "tests.fuzz.worker", mode, str(seed), str(seconds), str(found)]
    log = found.parent / f"{mode}.log"
    with log.open("wb") as output:
        done = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=False)
    tally = found / "tally.json"
    if not tally.exists():
        print(f"{mode}: the process ended with {done.returncode} while it tried the recipe in")
        print(f"  {found / 'running'}; what it said is in {log}")
        return {}, 1
    data = json.loads(tally.read_text())
    for number, (what, times) in enumerate(data["findings"].items(), 1):
        print(f"FOUND {times} times: {what}\n  {found / f'finding-{number}'}")
    return {kind: Counter(counts) for kind, counts in data["counts"].items()}, len(data["findings"])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("recipe", nargs="*", help="try these again, instead of new ones")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"), help="where findings go")
    parser.add_argument("--plain", action="store_true", help="without atheris")
    words = parser.parse_args()
    if words.recipe:
        return 1 if _reproduce(words.recipe) else 0

    modes = ["plain", "guided"]
    if words.plain or find_spec("atheris") is None:
        print("without atheris: all of the time by chance alone")
        modes = ["plain"]
    total: dict[str, Counter[str]] = {}
    findings = 0
    for mode in modes:
        found = words.found / mode
        shutil.rmtree(found, ignore_errors=True)
        found.mkdir(parents=True)
        counts, kinds = _work(mode, words.seed, words.seconds / len(modes), found)
        findings += kinds
        cases = sum(count["cases"] for count in counts.values())
        print(f"{mode}: {cases} cases, {kinds} kinds of findings", flush=True)
        for kind, count in counts.items():
            total.setdefault(kind, Counter()).update(count)
    print(f"{'':16}" + "".join(f"{name:>10}" for name in _COLUMNS))
    total["all"] = sum(total.values(), Counter())
    for kind, count in sorted(total.items(), key=lambda item: (item[0] == "all", item[0])):
        print(f"{kind:16}" + "".join(f"{count[name]:>10}" for name in _COLUMNS))
    cases, opened = total["all"]["cases"], total["all"]["opened"]
    print(
        f"seed {words.seed}: {cases} cases, {opened} accepted, {cases - opened} refused, ", end=""
    )
    print(f"{findings} kinds of findings")
    return 1 if findings or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
