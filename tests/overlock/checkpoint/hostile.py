"""Makes files that must not load, more than 300 of them; as a script, loads each and tells what happened.

Each is made from the state dict of a network, so that a reader which takes it would load it.
"""

import gzip
import io
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

# What crafted files try to make.
CANARY = 'ran'
RECONSTRUCT, SCALAR = np.ndarray(0).__reduce__()[0], np.float64().__reduce__()[0]

NAMES = """
os.system os.popen os.execv os._exit os.remove posix.system posix.mkdir nt.system sys.exit sys.settrace
subprocess.Popen subprocess.call subprocess.check_output commands.getoutput pty.spawn
__builtin__.eval __builtin__.exec __builtin__.compile __builtin__.open __builtin__.__import__ __builtin__.getattr
__builtin__.setattr __builtin__.globals __builtin__.map __builtin__.type __builtin__.object builtins.eval
importlib.import_module runpy.run_path runpy.run_module code.interact pdb.run timeit.timeit cProfile.run
shutil.rmtree shutil.move pathlib.Path tempfile.mkdtemp webbrowser.open socket.socket urllib.request.urlopen
http.client.HTTPConnection ctypes.CDLL ctypes.string_at ctypes.memmove mmap.mmap
pickle.loads _pickle.Unpickler marshal.loads types.FunctionType types.CodeType copyreg._reconstructor
copyreg.__newobj__ functools.partial functools.reduce operator.attrgetter operator.methodcaller itertools.starmap
torch.load torch.hub.load torch.jit.load torch.ops.load_library torch.storage._load_from_bytes torch.FloatTensor
torch.from_file torch._C._from_dlpack torch.utils.cpp_extension.load torch.serialization.load torch.FloatStorage
torch.nn.modules.module.Module torch._utils._rebuild_qtensor torch._utils._rebuild_sparse_tensor
torch._utils._rebuild_nested_tensor torch._utils._rebuild_wrapper_subclass
torch._utils._rebuild_device_tensor_from_numpy torch.fx.graph_module.reduce_graph_module
numpy.load numpy.fromfile numpy.memmap numpy.frombuffer numpy.matrix numpy.lib.format.read_array numpy.savetxt
numpy.core.records.fromfile numpy.f2py.compile mmengine.config.Config.fromstring mmengine.fileio.load yaml.unsafe_load
""".split()
# What a HistoryBuffer and a state dict are pickled with, to be misused as well.
ALLOWED = ['__builtin__.getattr', 'argparse.Namespace', 'collections.OrderedDict', 'numpy.dtype', 'torch.device']
# Of each kind of fault one, for the tests of the ways to load a file.
FEW = ('os.system', 'one NaN', 'archive cut to 12/24')
REPRESENTATIVES = (
    *FEW,
    '__builtin__.eval',
    'array of objects by its class',
    '6 GB by bytearray',
    'tensor of 4 TB',
    'compressed archive',
    'tar of torch',
    'TorchScript',
    'page',
    'nothing at all',
    'bit changed in a tensor',
    'integers',
    'all without values',
    'deep tuple as a key',
    'header of 2 ** 63 bytes (safetensors)',
)


class Call:
    """Pickles as a call, and as the state given to what the call returns."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


class Name:
    """Pickles as a call of a name that need not exist."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


class Pickler(pickle._Pickler):
    """Writes names that need not exist, and storages that need not be there."""

    def save(self, value, *args, **kwargs):
        if isinstance(value, Name):
            module, _, name = value.name.rpartition('.')
            self.write(pickle.GLOBAL + f'{module}\n{name}\n'.encode())
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(value, bytes) and value.startswith(b'!'):
            self.write(value[1:])
        else:
            super().save(value, *args, **kwargs)

    def persistent_id(self, value):
        return value[1:] if isinstance(value, tuple) and value[:1] == ('persistent',) else None


def pickled(value, protocol=2) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


def archive(content: bytes, storages=(), compression=zipfile.ZIP_STORED, **more) -> bytes:
    """An archive as torch.save writes it, with these bytes for its pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression) as target:
        members = {'data.pkl': content, 'byteorder': b'little', 'version': b'3\n', **more}
        for name, data in [*members.items(), *((f'data/{i}', data) for i, data in enumerate(storages))]:
            target.writestr(f'archive/{name.replace("__", "/")}', data)
    return file.getvalue()


def older(content: bytes, keys=(), storages=b'') -> bytes:
    """A file as torch wrote it before version 1.6, with these bytes for its pickle."""
    heads = (0x1950A86A20F9469CFC6C, 1001, dict(protocol_version=1001, little_endian=True, type_sizes={}))
    return b''.join(pickle.dumps(head, 2) for head in heads) + content + pickle.dumps(list(keys), 2) + storages


def saved(value, **kwargs) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **kwargs)
    return file.getvalue()


def storage(numel, kind=torch.FloatStorage, key='0', location='cpu'):
    return ('persistent', 'storage', kind, key, location, numel)


def tensor(offset=0, size=(2,), stride=(1,), numel=2, **kwargs):
    return Call(torch._utils._rebuild_tensor_v2, storage(numel, **kwargs), offset, size, stride, False, OrderedDict())


KINDS = {torch.float32: torch.FloatStorage, torch.int64: torch.LongStorage}


class Whole:
    """Puts something beside weights, in a file that is whole apart from it."""

    def __init__(self, weights):
        self.storages = [bytes(8), *(value.numpy().tobytes() for value in weights.values())]
        self.plain = {
            name: tensor(0, tuple(value.shape), value.stride(), value.numel(), key=str(i), kind=KINDS[value.dtype])
            for i, (name, value) in enumerate(weights.items(), 1)
        }

        self.pickled = pickled(self.plain)[2:-1]

    def _beside(self, extra, protocol=2):
        names = (pickle.BINUNICODE + struct.pack('<I', len(name)) + name for name in (b'state_dict', b'extra'))
        parts = zip(names, (self.pickled, pickled(extra)[2:-1]), strict=True)
        items = b''.join(name + value for name, value in parts)
        return (
            pickle.PROTO + bytes([protocol]) + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP
        )

    def __call__(self, extra, protocol=2, first=bytes(8)):
        return archive(self._beside(extra, protocol), [first, *self.storages[1:]])

    def older(self, extra):
        # The first storage is there only if something asks for it.
        content = self._beside([tensor(), extra])
        numels = [2, *(call.reduced[1][0][5] for call in self.plain.values())]
        data = b''.join(struct.pack('<q', n) + data for n, data in zip(numels, self.storages, strict=True))
        return older(content, map(str, range(len(numels))), data)


def array(shape, dtype, data, kind=np.ndarray):
    return Call(RECONSTRUCT, kind, (0,), b'b', state=(1, shape, dtype, False, data))


def cut(name, content, count):
    return {f'{name} cut to {i}/{count}': content[: len(content) * i // count] for i in range(count)}


def flipped(weights) -> dict[str, bytes]:
    """The archive with one bit changed, at places all over each of its parts."""
    content = saved(weights)
    start = content.index(b'PK\1\2')
    end = content.rindex(b'PK\5\6')
    pickle_end = content.index(b'PK\3\4', 4)
    parts = {'pickle': (0, pickle_end), 'weights': (pickle_end, start), 'directory': (start, end)}
    places = {
        f'{part} {i}': first + (last - first) * i // 16 for part, (first, last) in parts.items() for i in range(16)
    }
    places |= {f'end {i}': end + i for i in range(0, 22, 2)}
    # The other places may be in the space between tensors.
    places['a tensor'] = content.index(max(weights.values(), key=torch.Tensor.numel).numpy().tobytes())
    changed = {}
    for name, place in places.items():
        data = bytearray(content)
        data[place] ^= 1 << place % 8
        changed[f'bit changed in {name}'] = bytes(data)
    return changed


def code(whole) -> dict[str, bytes]:
    """Files that ask for names; where one is called, it is with the name of a folder to make."""
    command = f'__import__("os").mkdir("{CANARY}")'
    files = {name: whole(Name(name, command)) for name in NAMES}
    files |= {f'{name}, misused': whole(Name(name, command, command)) for name in ALLOWED}
    text = pickle.BINUNICODE + struct.pack('<I', len(command)) + command.encode()
    arguments = text + pickle.TUPLE1
    for name in ('os.system', '__builtin__.eval', 'collections.OrderedDict', 'torch.nn.parameter.Parameter'):
        module, _, last = name.rpartition('.')
        named = f'{module}\n{last}\n'.encode()
        stack = b''.join(pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, last))
        codes = {
            'INST': pickle.MARK + text + pickle.INST + named,
            'OBJ': pickle.MARK + pickle.GLOBAL + named + text + pickle.OBJ,
            'NEWOBJ': pickle.GLOBAL + named + arguments + pickle.NEWOBJ,
            'BUILD': pickle.GLOBAL + named + arguments + pickle.BUILD,
            'STACK_GLOBAL': stack + pickle.STACK_GLOBAL + arguments + pickle.REDUCE,
            'EXT1': pickle.EXT1 + b'\1' + arguments + pickle.REDUCE,
        }
        for kind, value in codes.items():
            files[f'{kind} of {name}'] = whole(b'!' + value)
            files[f'{kind} of {name} in an older file'] = whole.older(b'!' + value)
    files['call without an archive'] = pickled(Name('os.system', f'mkdir {CANARY}'))
    files['call before an older file'] = files['call without an archive'] + whole.older(1)
    files |= {f'protocol {i}': whole(1, i) for i in (1, 4, 5)}
    return files


def memory(whole) -> dict[str, bytes]:
    """Files that promise more than they have, or point outside of it."""
    f8, pointer, huge = np.dtype('f8'), b'AAAAAAAA', 6 * 10**9
    text = pickle.BINUNICODE + struct.pack('<I', 4) + b'text'
    long = pickle.BINUNICODE + struct.pack('<I', 4 << 20) + b't' * (4 << 20) + pickle.BINPUT + b'\xff'
    turned = pickle.GLOBAL + b'_codecs\nencode\n' + pickle.BINGET + b'\xff'
    turned += pickle.BINUNICODE + b'\6\0\0\0latin1' + pickle.TUPLE2 + pickle.REDUCE
    values = {
        'array of objects': array((1,), np.dtype('O'), pointer),
        'array of objects by its class': Call(np.ndarray, (1,), 'O', pointer),
        'array of objects by its dtype': array((1,), Call(np.dtype, 'O', False, True), pointer),
        'array of fields': array((1,), np.dtype('f8,f8'), pointer * 2),
        'array of too few bytes': array((2,), f8, pointer),
        'array of 8 TB': array((2**40,), f8, pointer),
        'array of negative size': array((-1,), f8, pointer),
        'array whose size overflows': array((2**61, 8), f8, b''),
        'array that makes itself': Call(RECONSTRUCT, np.ndarray, (2**40,), b'd'),
        'scalar that is an object': Call(SCALAR, np.dtype('O'), pointer),
        'matrix': array((1, 1), f8, pointer, np.matrix),
        '6 GB by bytes': Call(bytes, huge),
        '6 GB by bytearray': Call(bytearray, huge),
        '6 GB by torch.FloatTensor': Name('torch.FloatTensor', huge),
        '6 GB by torch.Tensor': Name('torch.Tensor', huge),
        '6 GB by UntypedStorage': Name('torch.storage.UntypedStorage', huge),
        '4 GB text': b'!' + pickle.BINUNICODE + b'\xff\xff\xff\xff' + b'text',
        '6 GB of BINBYTES8': b'!' + pickle.BINBYTES8 + struct.pack('<Q', huge),
        '6 GB of BYTEARRAY8': b'!' + pickle.BYTEARRAY8 + struct.pack('<Q', huge),
        '2 GB number': b'!' + pickle.LONG4 + struct.pack('<i', 2**31 - 1),
        '2 GB of BINBYTES': b'!' + pickle.BINBYTES + struct.pack('<I', 2**31),
        'negative text': b'!' + pickle.BINSTRING + struct.pack('<i', -1),
        'text that widens': 'a' * (4 << 20) + '\U0001f600',
        'empty dictionaries': b'!' + pickle.MARK + pickle.EMPTY_DICT * (4 << 20) + pickle.TUPLE,
        'empty lists': b'!' + pickle.MARK + pickle.EMPTY_LIST * (4 << 20) + pickle.TUPLE,
        'text in hexadecimal': Name('_codecs.encode', 'text', 'hex'),
        'text unpacked': Name('_codecs.encode', 'text', 'unicode_escape'),
        'text turned to bytes again and again': b'!' + pickle.MARK + long + turned * 100 + pickle.TUPLE,
        'tensor that is longer than its storage': tensor(size=(3,)),
        'tensor of 4 TB': tensor(size=(2**40,)),
        'tensor of 4 TB in one value': tensor(size=(2**40,), stride=(0,)),
        'tensor behind its storage': tensor(offset=1),
        'tensor far behind its storage': tensor(offset=2**61),
        'tensor before its storage': tensor(offset=-1),
        'tensor of negative size': tensor(size=(-1,)),
        'tensor of negative stride': tensor(stride=(-1,)),
        'tensor of great stride': tensor(stride=(2**40,)),
        'tensor whose bytes overflow': tensor(size=(2**31, 2**31), stride=(2**31, 1)),
        'tensor of a size beyond 64 bits': tensor(size=(2**80,)),
        'tensor of sizes without strides': tensor(size=(1, 2)),
        'tensor of a thousand dimensions': tensor(size=(1,) * 1000, stride=(1,) * 1000),
        'tensor of real sizes': tensor(size=(2.0,)),
        'tensor of a text': Call(torch._utils._rebuild_tensor_v2, 'text', 0, (2,), (1,), False, OrderedDict()),
        'storage of 4 TB': tensor(numel=2**40),
        'storage of too many values': tensor(numel=3),
        'storage of wider values': tensor(kind=torch.DoubleStorage),
        'storage of negative length': tensor(numel=-1),
        'storage that is not there': tensor(key='99999'),
        'storage outside of the folder': tensor(key='../data.pkl'),
        'storage by a number': tensor(key=0),
        'module by its source': ('persistent', 'module', dict, 'os.py', 'import os'),
        'storage by a text': ('persistent', 'storage', 'text', '0', 'cpu', 2),
        'same bytes in many tensors': [tensor(size=(1 << 18,), numel=1 << 18) for _ in range(50)],
        'parameter of a text': Name('torch._utils._rebuild_parameter', 'text', True, None),
        'attributes of a class': b'!' + pickle.GLOBAL + b'argparse\nNamespace\n' + text + pickle.BUILD,
        'tensor with another memory': Call(torch.Tensor, state=(storage(2), 0, (2**40,), (1,))),
    }
    many_bytes = np.ones(1 << 18, 'f4').tobytes()
    files = {name: whole(value, first=many_bytes if 'same' in name else bytes(8)) for name, value in values.items()}
    older_too = (
        'array of objects',
        'array of 8 TB',
        '6 GB by bytearray',
        '4 GB text',
        'tensor of 4 TB',
        'storage of 4 TB',
    )
    files |= {f'{name} in an older file': whole.older(values[name]) for name in older_too}
    many = io.BytesIO()
    with zipfile.ZipFile(many, 'w') as target:
        for i in range(1000):
            target.writestr(f'{i}/{"a" * 5000}', b'')
    files['zip of long names'] = many.getvalue()
    files['compressed zeros'] = archive(pickled(whole.plain), [bytes(64 << 20)], zipfile.ZIP_DEFLATED)
    plain = whole(1)
    # In the directory, the sizes of the first part.
    place = plain.index(b'PK\1\2') + 20
    lie = struct.pack('<II', 2**32 - 2, 2**32 - 2)
    files['part that says it is of 4 GB'] = plain[:place] + lie + plain[place + 8 :]
    return files


def structure(whole) -> dict[str, bytes]:
    """Files of values that are strange, or of none that are weights."""
    deep = pickle.NONE + pickle.TUPLE1 * 100_000
    keys = {
        'deep tuple': b'!' + deep,
        'pair of pairs': ((1, 2), (3, 4)),
        'tensor': tensor(),
        'text of a megabyte': 'a' * (1 << 20),
        'escape': '\x1b[2Jweights',
        'lines': 'base_net\nweights',
    }
    values = {
        'deep set': b'!'
        + pickle.GLOBAL
        + b'__builtin__\nset\n]'
        + deep
        + pickle.APPEND
        + pickle.TUPLE1
        + pickle.REDUCE,
        'deep counts': Name('collections.Counter', [b'!' + deep]),
        'deep order': Name('collections.OrderedDict', [(b'!' + deep, 1)]),
        'deep list': b'!' + pickle.EMPTY_LIST * 50_000 + pickle.APPEND * 49_999,
        'deep dictionary': b'!' + (pickle.EMPTY_DICT + b'K\1') * 5000 + pickle.NONE + pickle.SETITEM * 5000,
        'deep key of a storage': ('persistent', 'storage', torch.FloatStorage, b'!' + deep, 'cpu', 2),
        'items of a tensor': b'!' + pickled(torch.Size([1]))[2:-1] + b'K\0K\0' + pickle.SETITEM,
        'list that is no list': b'!' + b'K\0K\0' + pickle.APPEND,
        'nothing on the stack': b'!' + pickle.REDUCE * 3,
        'memory that was never written': b'!' + pickle.LONG_BINGET + b'\xff\xff\xff\xff',
        'text that is no UTF-8': b'!' + pickle.BINUNICODE + b'\2\0\0\0\xff\xfe',
        'name of a megabyte': Name(f'os.{"a" * (1 << 20)}', 1),
        'name with an escape': Name('os.\x1b[2J', 1),
    }
    alone = {
        'nothing': None,
        'list': [1],
        'number': 3,
        'text': 'weights',
        'empty dictionary': {},
        'no tensors': {'a': 1},
    }
    for name, key in keys.items():
        raw = key[1:] if name == 'deep tuple' else pickled(key)[2:-1]
        values[f'{name} as a key'] = b'!' + pickle.EMPTY_DICT + raw + b'K\1' + pickle.SETITEM
    return {
        **{name: whole(value) for name, value in values.items()},
        **{f'{name} alone': archive(pickled(value)) for name, value in alone.items()},
        'weights in a list': archive(pickled([whole.plain]), whole.storages),
        'weights two levels down': archive(pickled({'a': {'state_dict': whole.plain}}), whole.storages),
        'no end': archive(pickled(whole.plain)[:-1], whole.storages),
        'no pickle': archive(b'', whole.storages),
        'three ends': pickle.dumps(1, 2) * 3,
    }


def formats(weights) -> dict[str, bytes]:
    """Files of other kinds."""
    whole = saved(weights)

    def zipped(members, **kwargs):
        file = io.BytesIO()
        with zipfile.ZipFile(file, 'w', **kwargs) as target:
            for name, data in members:
                target.writestr(name, data)
        return file.getvalue()

    def tarred(*names):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode='w') as target:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(whole)
                target.addfile(info, io.BytesIO(whole))
        return file.getvalue()

    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), program)
    arrays = io.BytesIO()
    np.savez(arrays, a=np.array([None]))
    with zipfile.ZipFile(io.BytesIO(whole)) as source:
        members = [(name, source.read(name)) for name in source.namelist()]
    locked = bytearray(zipped(members))
    locked[locked.index(b'PK\1\2') + 8] |= 1
    named = [(name.replace('archive/', ''), data) for name, data in members]
    return {
        'nothing at all': b'',
        'one byte': b'\x80',
        'two bytes': b'PK',
        'page': b'<!DOCTYPE html><html>404: Not Found</html>',
        'pointer of git-lfs': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n',
        'JSON': b'{"state_dict": {}}' * 100,
        'image': b'\x89PNG\r\n\x1a\n' + bytes(100),
        'ELF': b'\x7fELF\2\1\1' + bytes(100),
        'HDF5': b'\x89HDF\r\n\x1a\n' + bytes(100),
        'zeros': bytes(10_000),
        'random bytes': np.random.default_rng(0).bytes(10_000),
        'compressed by gzip': gzip.compress(whole),
        'tar of torch': tarred('storages', 'tensors', 'pickle', 'sys_info'),
        'tar with a path outside': tarred('../../storages'),
        'tar of a checkpoint': tarred('a.pth'),
        'TorchScript': program.getvalue(),
        'TorchScript by its code': archive(pickled({}), code__torch__py=b'import os'),
        'TorchScript by its constants': archive(pickled({}), **{'constants.pkl': pickled(())}),
        'arrays of NumPy': arrays.getvalue(),
        'zip of a checkpoint': zipped([('a.pth', whole)]),
        'empty zip': zipped([]),
        'zip without a folder': zipped(named),
        'compressed archive': zipped(members, compression=zipfile.ZIP_DEFLATED),
        'archive by bzip2': zipped(members, compression=zipfile.ZIP_BZIP2),
        'encrypted archive': bytes(locked),
        'two archives in one': zipped([*members, *((f'b{name}', data) for name, data in members)]),
        'parts of one name': zipped([*members, members[-1]]),
        'archive of another byte order': zipped([(n, b'big' if n.endswith('byteorder') else d) for n, d in members]),
        'archive with a tail': whole + b'tail',
        'older file of another byte order': older(pickled({})).replace(b'\x88', b'\x89'),
        'older file of another version': older(pickled({})).replace(struct.pack('<H', 1001), struct.pack('<H', 1002)),
        'older file without storages': saved(weights, _use_new_zipfile_serialization=False)[:-8],
    }


def safetensors(weights) -> dict[str, bytes]:
    from safetensors.torch import save

    whole = save({name: value.contiguous() for name, value in weights.items()})
    length = struct.unpack('<Q', whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    first = next(name for name, entry in header.items() if entry.get('dtype') == 'F32')

    def file(content, data=data):
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        return struct.pack('<Q', len(text)) + text + data

    def changed(**entries):
        return file({**header, first: {**header[first], **entries}})

    start, end = header[first]['data_offsets']
    empty = {'dtype': 'F32', 'shape': [0], 'data_offsets': [len(data)] * 2}
    twice = json.dumps(header).encode()[:-1] + b', ' + json.dumps({first: header[first]}).encode()[1:]
    return {
        **cut('safetensors', whole, 12),
        'header of 2 ** 63 bytes': struct.pack('<Q', 2**63) + whole[8:],
        'header longer than the file': struct.pack('<Q', len(whole)) + whole[8:],
        'header of 50 MB': file(b'{' + b' ' * (50 << 20) + b'}', b''),
        'header that is no JSON': file(b'{' * 100),
        'header that is deep': file(b'{"a":' * 10_000 + b'1' + b'}' * 10_000),
        'header that is a list': struct.pack('<Q', 2) + b'[]',
        'header that is no UTF-8': file(b'{"\xff": 1}'),
        'tensor without a type': file({**header, first: {}}),
        'tensor of an unknown type': changed(dtype='O'),
        'tensor of a wider type': changed(dtype='F64'),
        'tensor with a negative size': changed(shape=[-1]),
        'tensor of 4 TB': changed(shape=[2**40]),
        'tensor whose size overflows': changed(shape=[2**40, 2**40]),
        'tensor behind the file': changed(data_offsets=[len(data), len(data) + end - start]),
        'tensors that overlap': changed(data_offsets=[start + 4, end + 4]),
        'tensor that ends before it starts': changed(data_offsets=[end, start]),
        'tensor named twice': file(twice),
        'metadata that are no text': file({**header, '__metadata__': {'a': [1]}}),
        'safetensors with a tail': whole + b'tail',
        'safetensors without tensors': file({}, b''),
        'safetensors with a name of a megabyte': file({**header, 'a' * (1 << 20): empty}),
    }


def content(weights) -> dict[str, bytes]:
    """Whole files of what cannot be weights."""
    first, *_, last = (name for name, value in weights.items() if value.is_floating_point())

    def changed(value, name=first):
        return {**weights, name: value}

    nan = float('nan')
    broken = weights[first].clone()
    broken.view(-1)[0] = nan
    contents = {
        'one NaN': changed(broken),
        'all NaN': {name: value * nan if value.is_floating_point() else value for name, value in weights.items()},
        'one infinity': changed(weights[last] + float('inf'), last),
        'minus infinity': changed(weights[first] - float('inf')),
        'NaN in float16': changed(broken.half()),
        'NaN in bfloat16': changed(broken.bfloat16()),
        'NaN in float64': changed(broken.double()),
        'NaN in float8': changed(broken.to(torch.float8_e5m2)),
        'integers': changed(weights[first].long()),
        'all bytes': {name: value.byte() for name, value in weights.items()},
        'bits': changed(weights[first] > 0),
        'complex numbers': changed(weights[first].cfloat()),
        'weights without values': changed(weights[first].to('meta')),
        'all without values': {name: value.to('meta') for name, value in weights.items()},
        'another shape': changed(weights[first][None]),
        'a text for a tensor': changed('text'),
        'a list for a tensor': changed(weights[first].tolist()),
        'an array for a tensor': changed(weights[first].numpy()),
        'weights that lack one': {name: value for name, value in weights.items() if name != first},
        'another network': {'layer1.weight': torch.ones(1)},
    }
    files = {name: saved(value) for name, value in contents.items()}
    files |= {
        f'{name} in an older file': saved(contents[name], _use_new_zipfile_serialization=False)
        for name in ('one NaN', 'integers')
    }
    return files | {'one NaN below state_dict': saved({'state_dict': contents['one NaN'], 'meta': {}})}


def make(folder: Path, weights: dict[str, torch.Tensor], only: tuple[str, ...] | None = None) -> dict[str, Path]:
    """Write the files into a folder, all or those named; return their paths by what is wrong with them."""
    whole = Whole(weights)
    files = {
        **cut('archive', saved(weights), 24),
        **cut('older file', saved(weights, _use_new_zipfile_serialization=False), 12),
        **flipped(weights),
        **code(whole),
        **memory(whole),
        **structure(whole),
        **formats(weights),
        **{f'{name} (safetensors)': data for name, data in safetensors(weights).items()},
        **content(weights),
    }
    paths = {}
    for i, (name, data) in enumerate(files.items()):
        if only is None or name in only:
            paths[name] = folder / f'{i}.{"safetensors" if name.endswith("(safetensors)") else "pth"}'
            paths[name].write_bytes(data)
    return paths


def main() -> None:
    """Load each file that the first argument lists into a tiny network; print name, time, memory and message."""
    from overlock import OverLoCKBackbone
    from overlock.checkpoint import CheckpointError, load_pretrained
    from tests.testing import TINY

    paths, whole = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    model = OverLoCKBackbone(TINY, out_indices=(0,))
    for _ in range(3):
        load_pretrained(model, whole)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    in_use = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (512 << 20),) * 2)
    for name, path in paths.items():
        print(json.dumps([name, None]), flush=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        try:
            load_pretrained(model, path)
            same = all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
            message = 'loaded, the same' if same else 'loaded'
        except CheckpointError as error:
            message = f'refused: {error}'
        except BaseException as error:
            message = f'{type(error).__name__}: {error}'[:300]
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        print(json.dumps([name, [message, more, os.path.getsize(path)]]), flush=True)


if __name__ == '__main__':
    main()
