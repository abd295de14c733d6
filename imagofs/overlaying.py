"""Temporary writes: an image opened for writing without being touched.

What is written goes to an overlay, a qcow2 whose backing file is the image. It is a temporary file
that has no name any more once it is open, or a file that is kept and can be used again.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

from .creating import create_qcow2
from .errors import ChainError, StorageError
from .format import probe_format
from .gate import ImplicitOpenGate, ImplicitOpenRequest, Role
from .opening import open_image, open_storage

if TYPE_CHECKING:
    from .access import FormatAccess

__all__ = ["open_with_overlay"]

_PROBE_BYTES = 4096


class _OverlayGate(ImplicitOpenGate):
    """Lets the overlay have its image; what the image refers to is for the other gate to judge."""

    def __init__(self, image: str, gate: ImplicitOpenGate) -> None:
        self._image = image
        self._gate = gate

    def check(self, request: ImplicitOpenRequest) -> None:
        """Let the file pass, or raise what the other gate raises."""
        if request.depth > 1 or request.role is not Role.BACKING:
            self._gate.check(request)
        elif request.path != self._image:
            raise ChainError(
                f"is no overlay of {self._image}: its backing file is {request.path}",
                filename=request.image,
            )


async def open_with_overlay(
    image: str,
    overlay: str | None,
    *,
    gate: ImplicitOpenGate,
    format: str | None = None,
    **options: Any,
) -> FormatAccess:
    """Open an image for writing; what is written goes to an overlay.

    Args:
        image: The image's path. It is opened read-only.
        overlay: The overlay's path: made if it is missing, used again if it is an overlay of
            this image. None: a temporary one below $TMPDIR or /var/tmp.
        gate: Decides on what the image refers to.
        format: The image's format; None: probed.
        options: Further keywords of `open_image`.

    Raises:
        ChainError: The file `overlay` is an image, but not an overlay of this one.
        ImagofsError: As `open_image`, and as `create_qcow2`.
    """
    path = os.path.realpath(image)
    guard = _OverlayGate(path, gate)
    temporary = overlay is None
    if overlay is None:
        overlay = _temporary_name()
    try:
        if temporary or not os.path.exists(overlay):
            await create_qcow2(
                overlay,
                backing_file=path,
                backing_format=format or await _probe(image),
                gate=guard,
                overwrite=temporary,
                mode=0o600,
            )
        access = await open_image(overlay, writable=True, format="qcow2", gate=guard, **options)
    finally:
        if temporary:
            os.unlink(overlay)
    if len(access.layers()) < 2:
        await access.close()
        raise ChainError(f"is no overlay of {path}: it has no backing file", filename=overlay)
    return access


def _temporary_name() -> str:
    folder = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        descriptor, name = tempfile.mkstemp(prefix="imagofs-overlay-", dir=folder)
    except OSError as error:
        raise StorageError.of("make a temporary overlay", error, folder) from error
    os.close(descriptor)
    return name


async def _probe(image: str) -> str:
    """The image's format, from its first bytes.

    Raises:
        ImagofsError: It cannot be read.
    """
    storage = await open_storage(image)
    try:
        first = await storage.read_table(min(_PROBE_BYTES, storage.size()), 0)
    finally:
        await storage.close()
    return probe_format(bytes(first))
