"""Files that trainers write, damaged ones, and crafted ones that would crash the process or run code."""

import os
import pickle
import signal
import subprocess
import sys
from argparse import Namespace
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from overlock.checkpoint import CheckpointError, load
from overlock.checkpoint.reading import read

RECONSTRUCT, SCALAR = np.ndarray(0).__reduce__()[0], np.float64().__reduce__()[0]
POINTER = b'AAAAAAAA'


class Call:
    """Pickles as a call, and as the state given to what the call returns."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def array(shape, dtype, data, fortran=False, kind=np.ndarray):
    return Call(RECONSTRUCT, kind, (0,), b'b', state=(1, shape, dtype, fortran, data))


def saved(value, folder):
    torch.save({'value': value}, folder / 'a.pth')
    return folder / 'a.pth'


@pytest.mark.parametrize(
    'value',
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype='f4').reshape(2, 3)),
        np.arange(6, dtype='>i2'),
        np.array(2.5),
        np.zeros((0, 3)),
        np.zeros((3, 0), order='F'),
        *(np.array([0, 1], dtype=code) for code in '?bBhHiIlLqQefdgFDG'),
        np.float64(0.25),
        np.int64(3),
        np.bool_(True),
        np.dtype('>f4').type(1.5),
    ],
    ids=lambda value: f'{np.asarray(value).dtype.str}{np.shape(value)}',
)
def test_numbers_of_numpy_load_as_they_were(value, tmp_path):
    loaded = read(saved(value, tmp_path))['value']
    assert type(loaded) is type(value) and loaded.dtype == value.dtype and loaded.shape == value.shape
    assert loaded.tobytes() == value.tobytes() and loaded.strides == value.strides
    if isinstance(value, np.ndarray):
        assert loaded.flags.writeable and loaded.flags.owndata


def test_arrays_are_found_in_every_container_and_stay_shared(tmp_path):
    shared = [np.arange(3)]
    shared.append(shared)
    content = OrderedDict(a=(1, (shared, {'b': shared})), options=Namespace(mean=np.ones(2)), dtype=np.dtype('f4'))
    loaded = read(saved(content, tmp_path))['value']
    first, inner = loaded['a'][1]
    assert first is inner['b'] and first[1] is first
    assert first[0].tolist() == [0, 1, 2] and loaded['options'].mean.tolist() == [1, 1]
    assert loaded['dtype'] == np.dtype('f4') and isinstance(loaded, OrderedDict)


def test_containers_that_share_much_load_quickly(tmp_path):
    value = (np.ones(1),)
    for _ in range(60):
        value = (value, value)
    loaded = read(saved(value, tmp_path))['value']
    assert loaded[0] is loaded[1]


def test_state_of_a_dtype_beyond_its_byte_order_is_ignored(tmp_path):
    fields = (3, '<', None, ('a',), {'a': (np.dtype('f8'), 0)}, 8, 8, 63)
    loaded = read(saved(array((1,), Call(np.dtype, 'f8', False, True, state=fields), POINTER), tmp_path))
    assert loaded['value'].dtype == np.dtype('f8') and loaded['value'].tobytes() == POINTER


@pytest.mark.parametrize(
    'value',
    [
        np.array([None]),
        array((1,), np.dtype('O'), POINTER),
        array((1,), Call(np.dtype, 'O', False, True), POINTER),
        array((1,), Call(np.dtype, 'f8,O', False, True, state=(3, '<')), POINTER),
        array((1,), Call(np.dtype, 'f8', False, True, state=(3, 'O,')), POINTER),
        np.array(['text']),
        np.array([b'text']),
        np.zeros(2, 'i4,f4'),
        np.zeros(2, [('a', 'f8', (2, 2))]),
        np.array(['2025-01-31'], 'M8[D]'),
        Call(SCALAR, np.dtype('O'), POINTER),
        np.str_('text'),
        np.void(POINTER),
    ],
)
def test_values_of_numpy_that_are_no_numbers_are_refused(value, tmp_path):
    with pytest.raises(CheckpointError, match='a.pth (holds NumPy values of type .*; save it again|is not a whole)'):
        read(saved(value, tmp_path))


F8 = np.dtype('f8')


@pytest.mark.parametrize(
    'value',
    [
        array((2,), F8, POINTER),
        array((1,), F8, POINTER * 2),
        array((2**40,), F8, POINTER),
        # Both counts of bytes are 0 modulo 2 ** 64.
        array((2**61, 8), F8, b''),
        array((-(2**60),), F8, b''),
        array((-1,), F8, POINTER),
        array((-1, -1), F8, POINTER),
        array((True,), F8, POINTER),
        array((1.0,), F8, POINTER),
        array((1,), F8, 'AAAAAAAA'),
        array((1,), F8, bytearray(POINTER)),
        array((1,), F8, [0.0]),
        array((1,), F8, torch.zeros(1)),
        Call(SCALAR, F8, POINTER * 2),
        Call(SCALAR, F8, b''),
    ],
)
def test_arrays_whose_bytes_do_not_fill_their_shape_are_refused(value, tmp_path):
    with pytest.raises(CheckpointError, match='a.pth (holds a NumPy array whose bytes do not fill its shape.*; save)'):
        read(saved(value, tmp_path))


@pytest.mark.parametrize(
    'value',
    [
        Call(np.ndarray, (1,), 'O', POINTER),
        Call(np.ndarray, (1,)),
        Call(RECONSTRUCT, np.ndarray, (2**40,), b'd'),
        Call(np.dtype, 'O'),
        Call(bytes, 6 * 10**9),
        array((0, 2**62, 2**62), F8, b''),
        array((1,) * 100, F8, POINTER),
        array((1,), np.int64(8), POINTER),
        array([[1]], F8, POINTER),
        array(None, F8, POINTER),
        Call(SCALAR, F8),
    ],
)
def test_calls_that_numpy_never_pickles_are_refused(value, tmp_path):
    reasons = 'is not a whole PyTorch checkpoint|holds a NumPy array whose|calls a class of NumPy'
    with pytest.raises(CheckpointError, match=f'a.pth ({reasons})'):
        read(saved(value, tmp_path))


@pytest.mark.parametrize(
    ('value', 'name'),
    [
        (array((1, 1), F8, POINTER, kind=np.matrix), 'numpy.matrix'),
        (array((1,), F8, POINTER, kind=np.recarray), 'numpy.*recarray'),
        (np.ma.ones(2), 'numpy.ma'),
        (Call(np.frombuffer, POINTER), 'numpy.frombuffer'),
        (Call(np.dtypes.ObjectDType), 'numpy.dtypes.ObjectDType'),
        (Call(getattr, np.ndarray, 'tofile'), 'builtins.getattr'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_other_classes_and_functions_are_named_and_refused(value, name, tmp_path):
    with pytest.raises(CheckpointError, match=f'a.pth asks for the Python object {name}'):
        read(saved(value, tmp_path))


def test_globals_that_a_user_allows_stay_allowed_except_those_of_numpy(tmp_path):
    class Config:
        pass

    Config.__qualname__ = 'Config'
    globals()['Config'] = Config
    allowed = [Config, np.ndarray, RECONSTRUCT, (np.dtype, 'numpy.dtype')]
    with torch.serialization.safe_globals(allowed):
        assert type(read(saved(Config(), tmp_path))['value']) is Config
        assert read(saved(np.ones(2), tmp_path))['value'].tolist() == [1, 1]
        with pytest.raises(CheckpointError):
            read(saved(Call(np.ndarray, (1,), 'O', POINTER), tmp_path))
        assert set(torch.serialization.get_safe_globals()) >= set(allowed)


@pytest.mark.slow
def test_file_that_crashes_numpy_does_not_crash_the_reader(tmp_path):
    path = tmp_path / 'crash.pth'
    path.write_bytes(pickle.dumps(Call(np.ndarray, (1,), 'O', POINTER), protocol=2))
    unsafe = 'import pickle, sys; pickle.load(open(sys.argv[1], "rb")).copy()'
    safe = 'import sys; from overlock.checkpoint.reading import read; read(sys.argv[1]).copy()'
    root = Path(__file__).parents[3]
    crashed = subprocess.run([sys.executable, '-c', unsafe, path], cwd=root)
    refused = subprocess.run([sys.executable, '-c', safe, path], cwd=root, capture_output=True, text=True)
    assert crashed.returncode == -signal.SIGSEGV
    assert refused.returncode == 1 and 'CheckpointError: ' in refused.stderr.splitlines()[-1]


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_file_that_would_run_code_is_refused_and_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {'a': torch.ones(1)}, 'meta': Call(os.mkdir, 'ran')}, tmp_path / 'bad.pth')
    (tmp_path / 'raw.pth').write_bytes(pickle.dumps(Call(os.mkdir, 'ran'), protocol=2))
    for name in ('bad.pth', 'raw.pth'):
        with pytest.raises(CheckpointError, match='asks for the Python object (posix|os).mkdir'):
            load(tmp_path / name)
    for protocol in (4, 5):
        torch.save({'a': torch.ones(1), 'meta': Call(os.mkdir, 'ran')}, tmp_path / 'new.pth', pickle_protocol=protocol)
        (tmp_path / 'raw.pth').write_bytes(pickle.dumps(Call(os.mkdir, 'ran'), protocol=protocol))
        for name in ('new.pth', 'raw.pth'):
            with pytest.raises(CheckpointError, match='a protocol that cannot be read safely, expected 2 or 3; save'):
                load(tmp_path / name)
    assert not (tmp_path / 'ran').exists()


def test_files_are_read_by_several_threads_and_torch_is_left_as_it_was(tmp_path):
    torch.save({'model': {'a.weight': torch.ones(1)}, 'args': Namespace(lr=1e-3)}, tmp_path / 'w.pth')
    allowed = torch.serialization.get_safe_globals()
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(load, [tmp_path / 'w.pth'] * 200))
    assert len(loaded) == 200
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
def test_prefixes_of_wrappers_are_taken_off(prefix, tmp_path):
    torch.save({'n_averaged': torch.tensor(3), f'{prefix}a.weight': torch.ones(1)}, tmp_path / 'w.pth')
    assert load(tmp_path / 'w.pth') == {'a.weight': torch.ones(1)}


@pytest.mark.parametrize('content', [b'', b'\x80', b'\x80\x02J', b'<html>404</html>', b'hello world this is text'])
def test_files_of_another_kind_are_errors(content, tmp_path):
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match='a.pth is not a whole PyTorch checkpoint'):
        load(tmp_path / 'a.pth')


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
def test_whole_files_load_and_cut_ones_are_errors(name, tmp_path):
    save = pytest.importorskip('safetensors.torch').save_file if name.endswith('.safetensors') else torch.save
    save({'a.weight': torch.ones(100)}, tmp_path / name)
    assert torch.equal(load(tmp_path / name)['a.weight'], torch.ones(100))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=f'{name} is not a whole PyTorch checkpoint'):
        load(tmp_path / name)


@pytest.mark.parametrize('content', [{'epoch': 3}, None, [torch.ones(1)]])
def test_file_without_weights_is_an_error(content, tmp_path):
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='a.pth holds no state dict: expected tensors by their names'):
        load(tmp_path / 'a.pth')


def test_missing_package_is_an_error(tmp_path, monkeypatch):
    path = saved(np.ones(1), tmp_path)
    monkeypatch.setitem(sys.modules, 'numpy', None)
    with pytest.raises(CheckpointError, match='a.pth needs a package that is not installed .*numpy.*; install it'):
        read(path)


@pytest.mark.parametrize(
    ('wrap', 'plain', 'average'),
    [
        (lambda plain, ema: {'state_dict': plain, 'state_dict_ema': ema, 'epoch': 3}, 1.0, 2.0),
        (lambda plain, ema: {'model': plain, 'model_ema': ema, 'args': Namespace(lr=1e-3)}, 1.0, 2.0),
        # mmengine's EMAHook swaps the two.
        (
            lambda plain, ema: {
                'state_dict': ema,
                'ema_state_dict': {
                    'steps': torch.tensor(5),
                    **{f'module.{name}': value for name, value in plain.items()},
                },
            },
            2.0,
            2.0,
        ),
        (lambda plain, ema: {'state_dict_ema': ema}, 2.0, 2.0),
    ],
)
def test_running_averages_are_taken_where_they_are_asked_for_or_all_there_is(wrap, plain, average, tmp_path):
    torch.save(wrap({'a.weight': torch.tensor(1.0)}, {'a.weight': torch.tensor(2.0)}), tmp_path / 'w.pth')
    assert load(tmp_path / 'w.pth') == {'a.weight': plain}
    assert load(tmp_path / 'w.pth', ema=True) == {'a.weight': average}


def test_missing_average_is_an_error(tmp_path):
    torch.save({'state_dict': {'a.weight': torch.ones(1)}}, tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match='w.pth holds no running average of weights: expected one of state_dict_'):
        load(tmp_path / 'w.pth', ema=True)
