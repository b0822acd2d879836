"""The compiled operators are found by what decides their binary code, and are missed without harm."""

import pytest
import torch

from overlock.ops import build, extension


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_CACHE', str(tmp_path))
    extension.load.cache_clear()
    yield tmp_path
    extension.load.cache_clear()


def test_path_differs_by_torch_processor_and_source(folder, monkeypatch):
    paths = {extension.library_path()}
    monkeypatch.setattr(torch, '__version__', '9.9.9')
    paths.add(extension.library_path())
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'OTHER')
    paths.add(extension.library_path())
    monkeypatch.setattr(extension, 'SOURCES', extension.SOURCES * 2)
    paths.add(extension.library_path())
    assert len(paths) == 4 and all(path.is_relative_to(folder) for path in paths)


def test_missing_library_says_what_compiles_it(folder):
    assert extension.load() == (
        False, 'not compiled for this PyTorch and processor; `python -m overlock.ops.build` does it')


def test_damaged_library_is_no_error_but_a_reason(folder):
    path = extension.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b'nothing that loads')
    runs, reason = extension.load()
    assert not runs and str(path) in reason and 'remove it and compile anew' in reason


def test_failed_compilation_leaves_nothing_and_a_clear_exit(folder, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError('Ninja is required to load C++ extensions')
    monkeypatch.setattr(build.cpp_extension, 'load', fails)
    assert build.main() == 1
    assert 'were not compiled; all runs without them' in capsys.readouterr().err
    assert not list(folder.rglob('*.so')) and not [path for path in folder.rglob('*') if path.is_file()]


def test_library_that_is_there_is_not_compiled_again(folder, monkeypatch, capsys):
    path = extension.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b'whatever')
    monkeypatch.setattr(build, 'cpp_extension', None)
    assert build.main() == 0
    assert capsys.readouterr().out.strip() == str(path)
