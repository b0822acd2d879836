"""Freed memory is kept where the C library can."""

import os
import platform
import subprocess
import sys

import pytest

from overlock.utils import memory

# Page faults of making a 64 MiB map again and again, before and after.
COUNT = """
import resource, torch, overlock
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(16, 2 ** 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
before = faults()
assert overlock.keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has these settings')
def test_large_maps_take_their_pages_once():
    environ = {name: value for name, value in os.environ.items() if not name.startswith(('LD_PRELOAD', 'MALLOC_'))}
    result = subprocess.run([sys.executable, '-c', COUNT], capture_output=True, text=True, env=environ)
    assert result.returncode == 0, result.stderr
    before, after = map(int, result.stdout.split())
    assert after < before / 4


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, 'libc_ver', lambda: ('', ''))
    assert not memory.keep_freed_memory()
