"""Unpickle what torch.save writes without running code: a name in the file stands for a function of this module.

Each function checks its arguments, and their sizes against the size of the file, before it allocates anything.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from overlock.checkpoint.stand_ins import (
    RUNS_CODE,
    SCALARS,
    TOO_LARGE,
    Array,
    Dtype,
    LoggedValues,
    method_name,
    scalar,
    shown,
)
from overlock.utils.errors import CheckpointError

# What torch.save writes with protocols 2 and 3. No opcode is here that calls anything but REDUCE and NEWOBJ do.
_OPCODES = b''.join(
    getattr(pickle, name)
    for name in (
        'PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING '
        'SHORT_BINBYTES BINBYTES EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM '
        'SETITEMS GLOBAL REDUCE NEWOBJ BUILD BINPUT LONG_BINPUT BINGET LONG_BINGET BINPERSID'
    ).split()
)
# An opcode makes at most some 200 bytes; real files have one for every seven bytes or more.
_FREE_READS = 2_000_000
_FREE_BYTES = 1 << 20
_LONG_TEXT = 1 << 20
_LONGEST_NAME = 1000
_MOST_DIMENSIONS = 64


class _Function(NamedTuple):
    """What a name in the file stands for where it may be called; no object on the stack can be called itself."""

    name: str
    run: Callable[..., Any]


class Storage(NamedTuple):
    """Bytes on the CPU, and the type of the numbers in them."""

    data: torch.UntypedStorage
    dtype: torch.dtype


class Source:
    """A file to unpickle from: never reads beyond its end or without end.

    Args:
        file: Opened for reading, at the beginning of the pickle.
        size: Of the whole file, in bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.reads = file, size, _FREE_READS + size // 32
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        self.reads -= 1
        if self.reads < 0:
            raise CheckpointError(f'holds more values than its {self.size} bytes have room for{TOO_LARGE}')
        if count > self.size - self.file.tell():
            raise EOFError
        return self.file.read(count)


class Unpickler(pickle._Unpickler):
    """An unpickler that calls nothing but the functions below, and classes that the user allowed in torch.

    What it returns may hold stand-ins, see `overlock.checkpoint.stand_ins.restored`.

    Args:
        source: The pickle.
        limit: Size of the file in bytes: at most twice as much is copied out of it, or viewed by its tensors.
        storage: Returns the bytes of a storage by its key and the number of bytes that it must have at least.
    """

    # Of the class above, in Python's library.
    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {code: pickle._Unpickler.dispatch[code] for code in _OPCODES}

    def __init__(self, source: Source, limit: int, storage: Callable[[str, int], torch.UntypedStorage]) -> None:
        super().__init__(source, encoding='latin-1')
        self.limit, self.storage = limit, storage
        self.copied = self.viewed = 0
        # The user's own entries count, except NumPy's functions, which crafted files can misuse.
        self.allowed = {
            name: target
            for name, target in map(_named, torch.serialization.get_safe_globals())
            if not name.startswith(('numpy.', 'builtins.', 'os.', 'posix.', 'nt.', 'sys.'))
        }
        self.names: dict[str, Any] = {
            **_CONSTANTS,
            **{name: _Function(name, run) for name, run in self._functions().items()},
        }

    def _functions(self) -> dict[str, Callable[..., Any]]:
        """Return by name what a file may call; NumPy 1 writes `core`, NumPy 2 `_core`."""
        return {
            'argparse.Namespace': lambda: argparse.Namespace(),
            'builtins.bytearray': self._bytearray,
            'builtins.bytes': lambda: b'',
            'builtins.complex': lambda real, imaginary: complex(float(real), float(imaginary)),
            'builtins.getattr': method_name,
            'builtins.set': self._set,
            '_codecs.encode': self._encode,
            'collections.Counter': self._counter,
            'collections.OrderedDict': self._ordered_dict,
            'mmengine.logging.history_buffer.HistoryBuffer': LoggedValues,
            'numpy.dtype': Dtype,
            'numpy.ndarray': _uncallable,
            **{
                f'numpy.{core}.multiarray.{name}': run
                for core in ('core', '_core')
                for name, run in (('_reconstruct', lambda *_: Array(self._copy)), ('scalar', scalar))
            },
            'torch.Size': torch.Size,
            'torch.Tensor': _uncallable,
            'torch.device': torch.device,
            'torch.nn.parameter.Parameter': _uncallable,
            'torch._tensor._rebuild_from_type_v2': self._from_type,
            'torch._utils._rebuild_meta_tensor_no_storage': self._meta,
            'torch._utils._rebuild_parameter': self._parameter,
            'torch._utils._rebuild_parameter_with_state': self._parameter,
            'torch._utils._rebuild_tensor': self._tensor,
            'torch._utils._rebuild_tensor_v2': self._tensor,
            'torch._utils._rebuild_tensor_v3': self._tensor_v3,
        }

    def find_class(self, module: str, name: str) -> Any:
        full = f'{module.replace("__builtin__", "builtins")}.{name}'
        if full in self.names:
            return self.names[full]
        if full in self.allowed:
            return self.allowed[full]
        raise CheckpointError(f'asks for the Python object {shown(full)}{RUNS_CODE}')

    def load_proto(self) -> None:
        self.proto = self.read(1)[0]
        if self.proto not in (2, 3):
            raise CheckpointError(
                'is pickled by a protocol that cannot be read safely, expected 2 or 3; save it again with the default '
                'protocol of torch.save.'
            )

    def load_binunicode(self) -> None:
        data = self.read(int.from_bytes(self.read(4), 'little'))
        # One such character makes Python keep every other in two or four bytes.
        if len(data) > _LONG_TEXT and re.search(rb'[\xc4-\xff]', data):
            raise CheckpointError(f'holds a text of {len(data)} bytes that is no array{TOO_LARGE}')
        self.append(str(data, 'utf-8', 'surrogatepass'))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        arguments, target = self.stack.pop(), self.stack.pop()
        self.append(target.__new__(target, *arguments) if self._is_allowed(target) else self._call(target, arguments))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, (Array, Dtype, LoggedValues)):
            target.fill(state)
        elif type(target) is argparse.Namespace:
            vars(target).update((name, value) for name, value in state.items() if checked_key(name))
        elif type(target) is OrderedDict:
            _set_versions(target, state)
        elif self._is_allowed(type(target)):
            self.stack.append(state)
            _build: Any = pickle._Unpickler.dispatch[pickle.BUILD[0]]
            _build(self)
        else:
            raise CheckpointError(f'sets the state of a {type(target).__name__}{RUNS_CODE}')

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items((key, value))

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    for _code, _run in (
        (pickle.PROTO, load_proto),
        (pickle.BINUNICODE, load_binunicode),
        (pickle.REDUCE, load_reduce),
        (pickle.NEWOBJ, load_newobj),
        (pickle.BUILD, load_build),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
    ):
        dispatch[_code[0]] = _run

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, numel = pid[:5]
        # Views of storages, the sixth part, are of torch 0.3.
        if kind != 'storage' or type(dtype) is not _StorageType or type(key) is not str or any(pid[5:]):
            raise CheckpointError(f'asks for a {shown(kind)} that is no storage of numbers{RUNS_CODE}')
        if type(numel) is not int or numel < 0:
            raise CheckpointError(f'holds a storage of {shown(numel)} values{TOO_LARGE}')
        return Storage(self.storage(key, numel * dtype.dtype.itemsize), dtype.dtype)

    def _is_allowed(self, target: Any) -> bool:
        return any(target is other for other in self.allowed.values())

    def _call(self, target: Any, arguments: tuple[Any, ...]) -> Any:
        if type(target) is _Function:
            return target.run(*arguments)
        if self._is_allowed(target):
            return target(*arguments)
        raise CheckpointError(f'calls a {type(target).__name__}{RUNS_CODE}')

    def _set_items(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict, Counter):
            raise CheckpointError(f'sets items of a {type(target).__name__}{RUNS_CODE}')
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def _copy(self, count: int) -> None:
        """Count bytes that are copied out of the file; a text or bytes may be named many times."""
        self.copied += count
        if self.copied > 2 * self.limit + _FREE_BYTES:
            raise CheckpointError(f'copies more than twice its {self.limit} bytes{TOO_LARGE}')

    def _encode(self, text: str, encoding: str) -> bytes:
        if type(text) is not str or encoding not in ('latin1', 'latin-1'):
            raise CheckpointError(f'encodes a {type(text).__name__} as {shown(encoding)}{RUNS_CODE}')
        self._copy(len(text))
        return text.encode('latin-1')

    def _bytearray(self, data: bytes = b'') -> bytearray:
        if type(data) is not bytes:
            raise CheckpointError(f'makes a bytearray of a {type(data).__name__}{RUNS_CODE}')
        self._copy(len(data))
        return bytearray(data)

    def _set(self, items: Iterable[Any] = ()) -> set[Any]:
        if type(items) is not list:
            raise CheckpointError(f'makes a set of a {type(items).__name__}{RUNS_CODE}')
        self._copy(64 * len(items))
        return set(map(checked_key, items))

    def _counter(self, counts: Any = None) -> Counter[Any]:
        counts = counts or {}
        if type(counts) is not dict:
            raise CheckpointError(f'counts a {type(counts).__name__}{RUNS_CODE}')
        self._copy(64 * len(counts))
        return Counter(counts)

    def _ordered_dict(self, items: Any = ()) -> OrderedDict[Any, Any]:
        self._copy(64 * len(items))
        return OrderedDict((checked_key(key), value) for key, value in items)

    def _tensor(self, storage: Storage, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
        return self._view(storage.data, storage.dtype, offset, size, stride)

    def _tensor_v3(
        self, storage: Storage, offset: int, size: Any, stride: Any, grad: object, hooks: object, dtype: Any, *_: object
    ) -> Tensor:
        return self._view(storage.data, dtype, offset, size, stride)

    def _view(self, data: torch.UntypedStorage, dtype: torch.dtype, offset: int, size: Any, stride: Any) -> Tensor:
        """View a part of a storage; torch itself would enlarge a storage that is too small."""
        numbers = (offset, *_sizes(size, stride))
        reach = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0
        count = math.prod(size)
        if min(numbers) < 0 or max(reach, count, offset) * dtype.itemsize > data.nbytes():
            shape = 'x'.join(map(str, size)) or 'a scalar'
            raise CheckpointError(f'holds a tensor ({shown(shape)}) beyond its {data.nbytes()} bytes{TOO_LARGE}')
        self.viewed += count * dtype.itemsize
        if self.viewed > 2 * self.limit + _FREE_BYTES:
            raise CheckpointError(f'gives the same bytes to many tensors, more than twice its size in all{TOO_LARGE}')
        return torch.empty(0, dtype=dtype).set_(data, offset, tuple(size), tuple(stride))

    def _meta(self, dtype: torch.dtype, size: Any, stride: Any, *_: object) -> Tensor:
        _sizes(size, stride)
        return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device='meta')

    def _parameter(self, data: Tensor, requires_grad: object, *_: object) -> nn.Parameter:
        return nn.Parameter(data, requires_grad=requires_grad is True and data.is_floating_point())

    def _from_type(self, function: Any, kind: object, arguments: tuple[Any, ...], *_: object) -> Any:
        """Build a tensor that has attributes, without them."""
        if type(function) is not _Function or not function.name.startswith('torch._utils._rebuild_'):
            raise CheckpointError(f'builds a tensor by a {type(function).__name__}{RUNS_CODE}')
        return function.run(*arguments)


class _StorageType(NamedTuple):
    dtype: torch.dtype


# By its class, which names a storage in the file, the type of its numbers.
_STORAGES = {
    'DoubleStorage': torch.float64,
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
    'ComplexDoubleStorage': torch.complex128,
    'ComplexFloatStorage': torch.complex64,
}
_CONSTANTS: dict[str, Any] = {
    **{f'torch.{name}': value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{f'torch.{name}': _StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{f'torch.cuda.{name}': _StorageType(dtype) for name, dtype in _STORAGES.items()},
    'torch.storage.UntypedStorage': _StorageType(torch.uint8),
}


def _named(entry: Any) -> tuple[str, Any]:
    return (entry[1], entry[0]) if isinstance(entry, tuple) else (f'{entry.__module__}.{entry.__qualname__}', entry)


def checked_key(key: Any) -> Any:
    """Return a key of a dictionary; Python crashes where it hashes deeply nested tuples."""
    plain = isinstance(key, SCALARS) or (type(key) is tuple and all(isinstance(part, SCALARS) for part in key))
    if not plain or (isinstance(key, str) and (len(key) > _LONGEST_NAME or not key.isprintable())):
        raise CheckpointError(
            f'holds the name {shown(key)}, expected at most {_LONGEST_NAME} printable characters or a number, and was '
            'not loaded; save it again with plain names.'
        )
    return key


def _sizes(size: Any, stride: Any) -> tuple[int, ...]:
    sizes = (*size, *stride)
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS or not all(type(n) is int for n in sizes):
        raise CheckpointError(f'holds a tensor of {len(size)} sizes and {len(stride)} strides{TOO_LARGE}')
    if not all(0 <= n < 2**62 for n in sizes):
        raise CheckpointError(f'holds a tensor with the size or stride {shown(max(sizes, key=abs))}{TOO_LARGE}')
    return sizes


def _set_versions(target: OrderedDict[Any, Any], state: Any) -> None:
    """Keep the versions of modules that `state_dict()` notes; other attributes could stand before methods."""
    noted = state.get('_metadata') if isinstance(state, dict) else None
    if isinstance(noted, dict):
        target._metadata = OrderedDict(  # type: ignore[attr-defined]
            (name, {'version': entry['version']})
            for name, entry in noted.items()
            if isinstance(name, str) and isinstance(entry, dict) and type(entry.get('version')) is int
        )


def _uncallable(*_: object) -> Any:
    """Stand for a class that files name as an argument only."""
    raise CheckpointError(f'calls a class of NumPy or torch{RUNS_CODE}')
