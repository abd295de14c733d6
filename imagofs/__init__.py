"""imagofs: virtual-machine disk images as flat raw disks, in Python and through FUSE.

Names are imported on first use, so that the daemon starts without what it does not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
