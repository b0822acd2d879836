"""Which way the packages look, in fresh interpreters."""

import subprocess
import sys

import pytest

# Package -> what must not be imported by importing it.
BANNED = {
    'overlock': ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'timm', 'triton', 'natten'),
    'mmdet_overlock': ('mmseg', 'mmseg_overlock'),
    'mmseg_overlock': ('mmdet', 'mmdet_overlock'),
    'mmengine_overlock': ('mmdet', 'mmseg', 'mmdet_overlock', 'mmseg_overlock'),
    'imagenet_overlock': ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmengine_overlock'),
}


def python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize('package', BANNED)
def test_import_brings_nothing_that_is_banned(package):
    # torch itself may bring triton; what counts is what our package adds to it.
    code = (
        f'import sys, torch; before = set(sys.modules); import {package}; '
        'print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))'
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert package in result.stdout.split()
    assert not set(result.stdout.split()) & set(BANNED[package])


def test_import_of_the_network_is_silent():
    result = python('import warnings; warnings.simplefilter("error"); import torch; import overlock')
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')
