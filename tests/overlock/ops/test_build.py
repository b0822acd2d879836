"""The compiled operators are found by what decides their binary code, and nothing breaks without them."""

import sys
from pathlib import Path

import pytest
import torch

from overlock.ops import build


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


def test_damaged_library_is_no_error_but_a_reason(folder):
    path = build.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b'nothing that loads')
    reason = build.load()
    assert str(path) in reason and 'compile it anew' in reason


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
