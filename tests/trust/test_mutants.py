"""The list of mutants fits the code: each says what it replaces as it stands there."""

from __future__ import annotations

import pytest

from tests.trust.mutants import FOLDER, MUTANTS, ROOT, SUITES, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.breaks)
def test_it_can_be_applied(mutant: Mutant) -> None:
    assert (ROOT / SUITES[mutant.suite]).exists()
    text = (ROOT / FOLDER / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
