"""A process that tries cases until its time is over: led by atheris, or by chance alone."""

from __future__ import annotations

import os
import random
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.fuzz.bounds import SECONDS, limit_memory

_RECIPE_BYTES = 96
_ADDRESS_SPACE = 8 << 30
#: What is traced runs slower.
_GUIDED_SECONDS = 5 * SECONDS


def plain(seed: str, seconds: float, found: Path) -> None:
    """Random recipes."""
    from tests.fuzz.tally import Tally

    limit_memory(_ADDRESS_SPACE)
    chance, tally = random.Random(seed), Tally(found)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        tally.run(chance.randbytes(chance.randrange(8, _RECIPE_BYTES)))
    tally.save()


def guided(seed: str, seconds: float, found: Path) -> None:
    """Recipes that reach more and more of the code; those are left in `corpus` beside `found`.

    One that is worth keeping goes into corpus.txt, in hexadecimal.
    """
    atheris: Any = import_module("atheris")
    with atheris.instrument_imports(include=["imagofs"]):
        from tests.fuzz.mutate import corpus
        from tests.fuzz.tally import Tally

    tally = Tally(found, seconds=_GUIDED_SECONDS)
    end = time.monotonic() + seconds

    def try_one(recipe: bytes) -> None:
        tally.run(recipe)
        if time.monotonic() > end:
            tally.save()
            os._exit(0)  # the fuzzer would not come to an end otherwise

    folder = found.parent / "corpus"
    folder.mkdir(exist_ok=True)
    for number, recipe in enumerate(corpus()):
        (folder / f"kept-{number}").write_bytes(recipe)
    options = [f"-seed={seed}", f"-max_len={_RECIPE_BYTES}", "-len_control=0", "-timeout=60"]
    atheris.Setup([sys.argv[0], *options, str(folder)], try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    mode, seed, seconds, found = sys.argv[1:]
    {"plain": plain, "guided": guided}[mode](seed, float(seconds), Path(found))
