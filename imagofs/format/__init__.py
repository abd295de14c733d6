"""Disk-image formats. A new one is a folder beside these, and one line in `FORMATS`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..opening import OpenContext
    from ..storage.base import Storage
    from .base import FormatDriver

__all__ = ["FORMATS", "probe_format"]


class OpenFormat(Protocol):
    """Opens the image in `storage` as one format; closes nothing if it fails."""

    def __call__(
        self,
        storage: Storage,
        *,
        context: OpenContext,
        writable: bool,
        snapshot: str | None,
    ) -> Awaitable[FormatDriver]: ...


def _qcow2() -> OpenFormat:
    from .qcow2.driver import open_qcow2

    return open_qcow2


def _vmdk() -> OpenFormat:
    from .vmdk import open_vmdk_layer

    return open_vmdk_layer


def _raw() -> OpenFormat:
    from .raw import open_raw

    return open_raw


#: Format name to a function that imports its driver.
FORMATS: dict[str, Callable[[], OpenFormat]] = {"qcow2": _qcow2, "vmdk": _vmdk, "raw": _raw}


def probe_format(first_bytes: bytes) -> str:
    """The format of a file that begins with `first_bytes` (some KiB); "raw" for anything else."""
    if first_bytes[:4] == b"QFI\xfb":
        return "qcow2"
    if first_bytes.startswith((b"KDMV", b"COWD", b"\xbe\xba\xfe\xca\0\0\0\0")):
        return "vmdk"
    if b"version" in first_bytes.lower():  # so for every descriptor, and hardly for a disk
        from .vmdk.descriptor import looks_like_descriptor

        if looks_like_descriptor(first_bytes):
            return "vmdk"
    return "raw"
