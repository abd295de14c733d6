"""Gates: who decides whether a file that an image refers to may be opened.

An image file is input from strangers, and it names other files: a backing file, a data file,
the extents of a VMDK. None of them is opened unless the caller's gate lets it pass.
"""

from __future__ import annotations

import enum
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from .arguments import check_type, path_of
from .errors import GateDeniedError, StorageError, WrongTypeError

__all__ = [
    "AllowDirectories",
    "DenyImplicitOpenGate",
    "ImplicitOpenGate",
    "ImplicitOpenRequest",
    "PermissiveImplicitOpenGate",
    "Role",
]


class Role(enum.Enum):
    """What the file is to the image that refers to it."""

    BACKING = "backing file"
    DATA = "data file"
    EXTENT = "extent"


@dataclass(frozen=True, slots=True)
class ImplicitOpenRequest:
    """What a gate is asked.

    Attributes:
        image: The image that refers to the file.
        name: The file as the image names it.
        path: The file as it would be opened: absolute, relative names resolved against the
            image's directory, symbolic links resolved.
        role: What the file is to the image.
        format: The format that it would be opened as ("qcow2", "raw" ...), None for storage
            without a format (a data file, an extent).
        format_guessed: The image does not say the format; it would be probed.
        writable: Whether it would be opened for writing.
        depth: 1 for what the top image refers to, 2 for what that one refers to, and so on.
    """

    image: str
    name: str
    path: str
    role: Role
    format: str | None
    format_guessed: bool
    writable: bool
    depth: int


class ImplicitOpenGate(ABC):
    """Decides on each file that an image refers to. Own gates override `check`."""

    @abstractmethod
    def check(self, request: ImplicitOpenRequest) -> None:
        """Return to let the file be opened.

        Raises:
            GateDeniedError: It may not be. Any other exception also keeps it closed.
        """


class PermissiveImplicitOpenGate(ImplicitOpenGate):
    """Lets every file be opened: for images whose origin is trusted."""

    def check(self, request: ImplicitOpenRequest) -> None:
        """Let the file pass."""


class DenyImplicitOpenGate(ImplicitOpenGate):
    """Lets no file be opened: the image must stand alone."""

    def check(self, request: ImplicitOpenRequest) -> None:
        """Refuse.

        Raises:
            GateDeniedError: Always.
        """
        raise GateDeniedError(
            f"refers to the {request.role.value} {request.name!r}, and nothing that it refers to "
            f"may be opened",
            filename=request.image,
        )


class AllowDirectories(ImplicitOpenGate):
    """Lets files below the given directories be opened, symbolic links resolved.

    Args:
        directories: The directories; they must exist.

    Raises:
        StorageError: One of them does not exist, or cannot be looked at.
        WrongTypeError: They are no paths, or one path instead of several.
    """

    def __init__(self, directories: Iterable[str | os.PathLike[str]]) -> None:
        if isinstance(directories, str | os.PathLike):
            raise WrongTypeError(f"give a list of directories, not {directories!r}")
        check_type("what holds the directories", directories, Iterable)
        self.directories = tuple(map(_real_directory, directories))

    def check(self, request: ImplicitOpenRequest) -> None:
        """Let the file pass if it lies below one of the directories.

        Raises:
            GateDeniedError: It lies elsewhere.
        """
        if not any(_is_below(request.path, directory) for directory in self.directories):
            raise GateDeniedError(
                f"refers to the {request.role.value} {request.name!r} ({request.path}), which is "
                f"not below {', '.join(self.directories)}",
                filename=request.image,
            )


def _real_directory(path: str | os.PathLike[str]) -> str:
    try:
        return os.path.realpath(path_of(path), strict=True)
    except OSError as error:
        raise StorageError.of("allow this directory", error, path_of(path)) from error


def _is_below(path: str, directory: str) -> bool:
    return os.path.commonpath((path, directory)) == directory
