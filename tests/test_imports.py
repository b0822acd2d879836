"""Which package may import which: read from the source, so that imports inside functions count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testing import ROOT

# Package or module -> all that it may import beside itself and the standard library.
MAY_IMPORT = {
    'overlock.utils': ['torch'],
    'overlock.ops': ['overlock.utils', 'torch'],
    'overlock.ops.contmix.triton': ['overlock.utils', 'torch', 'triton'],
    'overlock.ops.contmix.triton_kernels': ['triton'],
    'overlock.ops.dilated_kernels': ['triton'],
    'overlock.ops.contmix.natten': ['overlock.utils', 'torch', 'natten'],
    'overlock.layers': ['overlock.ops', 'overlock.utils', 'torch'],
    'overlock.models': ['overlock.layers', 'overlock.ops', 'overlock.utils', 'torch'],
    # filelock comes with torch.
    'overlock.checkpoint': ['overlock.models', 'overlock.utils', 'filelock', 'numpy', 'safetensors', 'torch'],
    'overlock.timm': ['overlock.checkpoint', 'overlock.layers', 'overlock.models', 'overlock.utils', 'timm', 'torch'],
    'overlock.cli': [
        'overlock',
        'imagenet_overlock',
        'mmcv',
        'mmengine',
        'mmengine_overlock',
        'packaging',
        'torch',
        'tqdm',
        'yaml',
    ],
    'overlock': [
        'overlock.cli',
        'overlock.checkpoint',
        'overlock.exports',
        'overlock.models',
        'overlock.ops',
        'overlock.utils',
    ],
    'mmengine_overlock': ['overlock', 'cv2', 'filelock', 'mmengine', 'numpy', 'PIL', 'pycocotools', 'torch', 'tqdm'],
    # mmcv folds the BatchNorms of heads.
    'mmengine_overlock.speed': ['mmengine_overlock', 'overlock', 'mmcv', 'mmengine', 'torch'],
    # mmdet's data sample, where a detector is exported; the packages of the extra `export`, where they are needed.
    'mmengine_overlock.export': [
        *['mmengine_overlock', 'overlock', 'mmdet', 'mmengine', 'numpy', 'PIL', 'torch', 'torchvision'],
        *['onnx', 'onnx_ir', 'onnxruntime', 'onnxscript', 'openvino'],
    ],
    # The toolboxes' segmenter and mask paster around exported networks; tiles, where they are asked for.
    'mmengine_overlock.predict': [
        *['mmengine_overlock', 'overlock', 'cv2', 'matplotlib', 'mmcv', 'mmdet', 'mmengine', 'mmseg', 'numpy', 'torch'],
        *['PIL', 'onnxruntime', 'pycocotools', 'sahi'],
    ],
    'mmdet_overlock': ['mmengine_overlock', 'mmdet'],
    'mmseg_overlock': ['mmengine_overlock', 'mmseg'],
    'imagenet_overlock': ['overlock', 'matplotlib', 'numpy', 'PIL', 'timm', 'torch', 'tqdm', 'yaml'],
}
PACKAGES = sorted({name.partition('.')[0] for name in MAY_IMPORT})
MODULES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
    for package in PACKAGES
    for path in (ROOT / package).rglob('*.py')
}


def within(name: str, package: str) -> bool:
    return f'{name}.'.startswith(f'{package}.')


def imports(module: str, path: Path) -> set[str]:
    """The modules that the source of a module imports, `from a import b` as a.b, without the standard library."""
    package = module.split('.') if path.stem == '__init__' else module.split('.')[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            source = '.'.join([*parents, *filter(None, [node.module])])
            found |= {f'{source}.{alias.name}' for alias in node.names}
    return {name for name in found if name.partition('.')[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize('package', MAY_IMPORT)
def test_package_imports_only_what_it_may(package):
    # The root of overlock imports some of its parts, not all.
    own = '' if package == 'overlock' else '.'.join(package.split('.')[:2])
    wrong = {}
    for module, path in MODULES.items():
        if package == max((name for name in MAY_IMPORT if within(module, name)), key=len):
            found = {name for name in imports(module, path) if not within(name, own)}
            wrong[module] = {name for name in found if not any(within(name, other) for other in MAY_IMPORT[package])}
    assert wrong and not any(wrong.values())


def test_reading_finds_every_form_of_import(tmp_path):
    for name in ('module', '__init__'):
        path = tmp_path / f'{name}.py'
        path.write_text(
            'import os, torch.nn as nn\nfrom timm import create_model\nfrom . import near\nfrom .near import thing\n'
            'def function():\n    from ..above import other\n'
        )
        found = imports('a.b.module' if name == 'module' else 'a.b', path)
        assert found == {'torch.nn', 'timm.create_model', 'a.b.near', 'a.b.near.thing', 'a.above.other'}


def test_root_of_overlock_has_at_most_four_modules():
    assert len(list((ROOT / 'overlock').glob('*.py'))) <= 4


def test_import_of_the_network_is_silent_and_brings_only_torch():
    # torch may import triton by itself, and filelock when it is asked for.
    code = (
        'import warnings; warnings.simplefilter("error"); import sys, torch; before = set(sys.modules); '
        'import overlock; overlock.OverLoCK, overlock.predict; '
        'print(*{name.partition(".")[0] for name in set(sys.modules) - before})'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, '')
    assert set(result.stdout.split()) - sys.stdlib_module_names <= {'overlock', 'filelock'}
