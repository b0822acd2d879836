"""How the C library hands memory to PyTorch on CPUs."""

import ctypes
import platform

# From malloc.h; mallopt takes an int.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2 ** 31 - 1


def keep_freed_memory() -> bool:
    """Lets glibc keep the memory of freed tensors for the next ones, in this process from now on.

    By itself glibc asks the kernel for each tensor above 32 MiB anew, and the kernel zeroes it page by page: an
    elementwise operation on a large map then waits for pages most of its time. The same as starting a process with
    `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` set to 2147483647; jemalloc and tcmalloc need neither.

    Returns:
        Whether it was done: only glibc knows these settings.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, LARGEST))
