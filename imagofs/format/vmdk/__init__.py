"""The VMDK formats of VMware's products: flat, sparse and stream-optimized extents.

`descriptor` and `sparse` parse bytes, `extents` and `grains` find bytes in storages, `driver` is
the format, `open` puts it together.
"""

from .driver import Vmdk
from .open import Opener, open_vmdk, open_vmdk_layer

__all__ = ["Opener", "Vmdk", "open_vmdk", "open_vmdk_layer"]
