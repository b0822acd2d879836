"""Keep freed memory for the next tensors on CPUs."""

import ctypes
import platform

# Alternatives measured on two AVX-512 cores: transparent huge pages (THP_MEM_ALLOC_ENABLE=1) copy 60 MB in 9 ms, these
# settings in 3 ms. MALLOC_MMAP_THRESHOLD_=131072 returns freed memory at once: a training step of XT at 2x512x512 then
# peaks at 1887 instead of 2585 MiB, but takes 2.3 times the processor time.

# From malloc.h; mallopt takes an int.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc keep the memory of freed tensors for the next ones, from now on in this process.

    By default glibc asks the kernel for every tensor above 32 MiB, and the kernel zeroes its pages one by one: an
    elementwise operation on a large map mostly waits for pages. jemalloc and tcmalloc do not need this. Return False
    where the C library is not glibc or refuses the settings.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Before 2.35 glibc refuses thresholds above 32 MiB, and takes no memory apart from the heap for a maximum of 0.
    from_heap = mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_MAX, 0)
    return bool(mallopt(M_TRIM_THRESHOLD, LARGEST)) and bool(from_heap)
