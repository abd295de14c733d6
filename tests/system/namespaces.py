"""Shell scripts in namespaces of their own: what they mount or start is gone when they end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(sys.executable).with_name("imagofs")
TIMEOUT_SECONDS = 60.0

#: Lets go of what other tests have mounted: the copies of their mounts that every new mount
#: namespace has would keep their daemons alive. Asks the mounts nothing: a daemon may be stopped.
LET_GO = "umount -a --lazy --no-canonicalize --internal-only --no-mtab -t fuse.imagofs || true"

#: /sbin is where mount(8) looks for helpers: a copy of it, which the helpers are written to.
_SBIN = """
set -eu
sbin=$(realpath /sbin)
mount -t tmpfs tmpfs /mnt
cp -a "$sbin/." /mnt/
mount --bind /mnt "$sbin"
umount /mnt
mount -t tmpfs tmpfs /run
"$IMAGOFS" install-helpers >/dev/null
# `no COMMAND`: it must fail. (A `!` does not end a script.)
no() { if "$@"; then echo "should have failed: $*" >&2; exit 99; fi; }
findmnt_here() { findmnt -rno TARGET -t fuse.imagofs | grep -F "$PWD"; }
"""


def in_namespaces(
    script: str, folder: Path, **environment: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run a shell script in mount and process namespaces of its own, with the helpers installed.

    It starts in `folder`, and ends with its first command that fails. `$IMAGOFS` is the program.
    Processes that it leaves are killed, and with them their mounts go.
    """
    command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    shell = shutil.which("bash") or "sh"
    return subprocess.run(
        [*command, "--mount-proc", shell, "-c", f"{LET_GO}\n{_SBIN}{script}"],
        cwd=folder,
        env={
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "IMAGOFS": str(PROGRAM),
            **{name: os.fspath(value) for name, value in environment.items()},
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=TIMEOUT_SECONDS,
    )


def succeeds(script: str, folder: Path, **environment: str | Path) -> str:
    """As `in_namespaces`, for a script that must succeed; returns what it printed."""
    done = in_namespaces(script, folder, **environment)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
