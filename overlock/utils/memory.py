"""How the C library hands memory to PyTorch on CPUs."""

import ctypes
import platform

# From malloc.h; mallopt takes an int.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets glibc keep the memory of freed tensors for the next ones, in this process from now on.

    By itself glibc asks the kernel for each tensor above 32 MiB anew, and the kernel zeroes it page by page: an
    elementwise operation on a large map then waits for pages most of its time. jemalloc and tcmalloc do not need it.

    Returns:
        Whether it was done: only glibc knows these settings.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Before 2.35 glibc refuses thresholds above 32 MiB, and takes no memory apart from the heap for a maximum of 0.
    from_heap = mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_MAX, 0)
    return bool(mallopt(M_TRIM_THRESHOLD, LARGEST)) and bool(from_heap)
