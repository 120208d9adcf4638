"""What glibc does with host memory that tensors have freed: keep it, or give it back at once.

[Note: freed host memory]
glibc takes blocks from its heap, and has them mapped one by one only above a threshold that rises to 32 MiB with the
largest block that was freed. What lies in the heap and is freed there stays the process's: memory of saved tensors that
have left is freed between others that live on, so that the process does not get smaller, whatever leaves. With a fixed
threshold large blocks are mapped, and freed they are the system's again. The kernel clears fresh pages, about 0.2 s a
GiB: that is the price, and it is paid only once offloading moves host memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED_FROM_NBYTES = 256 << 10
_TRIMMED_FROM_NBYTES = 16 << 20  # free memory at the end of the heap
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def has_decided(environment: Mapping[str, str]) -> bool:
    """Whether the user has told glibc when to map and to trim: then that stays."""
    return any(name in environment for name in _SETTINGS) or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")


def give_back_freed(environment: Mapping[str, str] = os.environ) -> str:
    """From now on large blocks that tensors free are the system's again at once; see [Note: freed host memory].

    Returns:
        Empty, or why it is not so: what the process then keeps is in no statement.
    """
    if has_decided(environment):
        return ""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallopt"):
        return "the C library is not glibc: what it keeps of freed tensors comes on top of what is stated here"
    libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_NBYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _TRIMMED_FROM_NBYTES)
    libc.malloc_trim(0)
    return ""
