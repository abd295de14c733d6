"""What the verbs that install files share: where the program is, and writing a file as a whole."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from ..errors import StorageError

__all__ = ["install", "program"]


def program() -> str:
    """The absolute path of the program `imagofs`, for files that call it.

    Raises:
        StorageError: There is none (the package is imported from a place where it is not
            installed).
    """
    candidates = [sys.argv[0]] if os.path.basename(sys.argv[0]) == "imagofs" else []
    candidates.append(os.path.join(sysconfig.get_path("scripts"), "imagofs"))
    for candidate in candidates:
        if found := shutil.which(candidate):
            return os.path.abspath(found)
    raise StorageError("the program is not installed here: there is no imagofs", filename=None)


def install(path: Path, text: str, *, mode: int) -> None:
    """Write a file, or replace it: nobody ever sees half of it.

    Raises:
        StorageError: That failed; what was there before is still there.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8", errors="surrogateescape")
        new.chmod(mode)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise StorageError.of("install", error, str(path)) from error
    print(path)
