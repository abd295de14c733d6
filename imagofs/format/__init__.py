"""Disk-image formats. A new one is a folder beside these, and one line in `FORMATS`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from ..opening import OpenContext
    from ..storage.base import Storage
    from .base import FormatDriver

__all__ = ["FORMATS", "PROBE_BYTES", "Format", "OpenFormat", "probe_format"]

#: Bytes from a file's start on that tell its format.
PROBE_BYTES = 4096


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


@dataclass(frozen=True, slots=True)
class Format:
    """One disk-image format.

    Attributes:
        name: As `qemu-img` spells it, and as the `format` of `open_image`.
        recognises: Whether a file with these first `PROBE_BYTES` bytes (or all of its bytes, if it
            is shorter) is of the format.
        home: The module and the function in it that opens an image of the format, imported when
            one is met: `"qcow2.driver:open_qcow2"`.
    """

    name: str
    recognises: Callable[[bytes], bool]
    home: str

    def opener(self) -> OpenFormat:
        """The function that opens an image of the format."""
        module, _, function = self.home.partition(":")
        return cast("OpenFormat", getattr(import_module(f".{module}", __name__), function))


def _is_qcow2(first_bytes: bytes) -> bool:
    return first_bytes.startswith(b"QFI\xfb")


def _is_vmdk(first_bytes: bytes) -> bool:
    if first_bytes.startswith((b"KDMV", b"COWD", b"\xbe\xba\xfe\xca\0\0\0\0")):
        return True
    if b"version" not in first_bytes.lower():  # so for every descriptor, and hardly for a disk
        return False
    from .vmdk.descriptor import looks_like_descriptor

    return looks_like_descriptor(first_bytes)


def _is_anything(first_bytes: bytes) -> bool:
    return True


#: Every format by its name, in the order in which they are probed.
FORMATS = {
    format.name: format
    for format in (
        Format("qcow2", _is_qcow2, "qcow2.driver:open_qcow2"),
        Format("vmdk", _is_vmdk, "vmdk:open_vmdk_layer"),
        Format("raw", _is_anything, "raw:open_raw"),
    )
}


def probe_format(first_bytes: bytes) -> str:
    """The format of a file with these first `PROBE_BYTES` bytes; "raw" for anything else."""
    return next(format.name for format in FORMATS.values() if format.recognises(first_bytes))
