"""The compiled operators are found by what decides their binary code, and nothing breaks without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from overlock.ops import build
from overlock.utils.files import keep_hash, sha256_of
from tests.testing import ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_CACHE', str(tmp_path))
    build.load.cache_clear()
    yield tmp_path
    build.load.cache_clear()


def hide_cpp_extension(monkeypatch):
    """Importing it fails."""
    monkeypatch.delattr(torch.utils, 'cpp_extension', raising=False)
    monkeypatch.setitem(sys.modules, 'torch.utils.cpp_extension', None)


def test_path_differs_by_torch_processor_and_source(folder, monkeypatch):
    paths = {build.library_path()}
    monkeypatch.setattr(torch, '__version__', '9.9.9')
    paths.add(build.library_path())
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'OTHER')
    paths.add(build.library_path())
    monkeypatch.setattr(build, 'SOURCES', build.SOURCES * 2)
    paths.add(build.library_path())
    assert len(paths) == 4 and all(path.is_relative_to(folder) for path in paths)


def test_missing_library_says_what_compiles_it(folder):
    assert build.load() == 'not compiled for this PyTorch and processor; `python -m overlock.ops.build` does it'


@pytest.mark.parametrize('compiled', [b'nothing that loads', b'the whole library', None])
def test_damaged_library_is_no_error_but_a_reason(folder, compiled):
    path = build.library_path()
    path.parent.mkdir(parents=True)
    if compiled is not None:
        path.write_bytes(compiled)
        keep_hash(path, sha256_of(path))
    path.write_bytes(b'nothing that loads')
    reason = build.load()
    assert str(path) in reason and 'compile it anew' in reason
    assert ('is not what was compiled' in reason) == (compiled != b'nothing that loads')


def test_cut_library_is_compiled_again(folder, monkeypatch):
    from torch.utils import cpp_extension

    runs = []

    def compile(name, *_, build_directory, **__):
        runs.append(name)
        Path(build_directory, f'{name}.so').write_bytes(b'machine code')

    monkeypatch.setattr(cpp_extension, 'load', compile)
    path = build.build()
    assert build.build() == path and len(runs) == 1
    os.truncate(path, 7)
    assert build.build().read_bytes() == b'machine code' and len(runs) == 2


@pytest.mark.slow
def test_cut_library_does_not_end_the_process(tmp_path):
    # ninja is beside this Python.
    folders = os.pathsep.join((str(Path(sys.executable).parent), os.environ['PATH']))
    environment = {**os.environ, 'OVERLOCK_CACHE': str(tmp_path), 'PATH': folders}

    def run(code):
        command = [sys.executable, '-c', f'import torch; from overlock.ops import build; print({code})']
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)

    path = Path(run('build.build()').stdout.strip())
    assert run('build.load()').stdout == '\n'
    for kept in (0.9, 0.5, 0.3, 0.1):
        os.truncate(path, int(path.stat().st_size * kept))
        assert 'is not what was compiled' in run('build.load()').stdout
    assert run(f'torch.ops.load_library({str(path)!r})').returncode


def test_failed_compilation_leaves_nothing_and_a_clear_exit(folder, monkeypatch, capsys):
    from torch.utils import cpp_extension

    def fails(*args, **kwargs):
        raise RuntimeError('Ninja is required to load C++ extensions')

    monkeypatch.setattr(cpp_extension, 'load', fails)
    assert build.main() == 1
    assert 'were not compiled; all runs without them' in capsys.readouterr().err
    assert not list(folder.rglob('*.so')) and not [path for path in folder.rglob('*') if path.is_file()]


def test_library_that_is_there_is_not_compiled_again(folder, monkeypatch, capsys):
    path = build.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b'whatever')
    keep_hash(path, sha256_of(path))
    hide_cpp_extension(monkeypatch)
    assert build.main() == 0
    assert capsys.readouterr().out.strip() == str(path)


def test_missing_setuptools_is_a_clear_exit(folder, monkeypatch, capsys):
    hide_cpp_extension(monkeypatch)
    assert build.main() == 1
    assert 'were not compiled; all runs without them' in capsys.readouterr().err


def test_user_without_a_home_goes_without_the_operators(monkeypatch):
    def nobody():
        raise RuntimeError('Could not determine home directory.')

    for name in ('OVERLOCK_CACHE', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, 'home', nobody)
    build.load.cache_clear()
    assert 'it does not load (Could not determine home directory.)' in build.load()
    build.load.cache_clear()
