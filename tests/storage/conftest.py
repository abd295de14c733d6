"""Fixtures of the storages' tests."""

import subprocess

import pytest


@pytest.fixture
def small_tmpfs(tmp_path):
    """A directory that is a file system with 256 KiB of room."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
