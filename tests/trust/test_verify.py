"""fio verifies amid trims and zeroes: a small sample of what `make verify` does."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.trust.verify import M, verify

SEED = int(os.environ.get("IMAGOFS_VERIFY_SEED", "0")) or random.randrange(1, 1 << 20)


def test_fio_verifies_amid_trims_and_zeroes(tmp_path: Path) -> None:
    print(f"IMAGOFS_VERIFY_SEED={SEED}")
    verified = verify("4k", 3 * M, SEED, tmp_path)
    assert not verified.mismatches
    assert verified.trims and verified.others
