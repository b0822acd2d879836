"""The three kinds of weight files: torch's archive, torch's older pickle, and safetensors.

Sizes are checked against that of the file before anything is allocated, and archives against their CRCs.
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import IO, Any, BinaryIO, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch

from overlock.checkpoint.stand_ins import TOO_LARGE, restored
from overlock.checkpoint.unpickling import Source, Unpickler, checked_key
from overlock.utils.errors import CheckpointError

# That of 60,000 tensors and more.
_LARGEST_DIRECTORY = 4 << 20
_LARGEST_HEADER = 4 << 20
_CHUNK = 1 << 20
# What torch writes at the beginning of its older files.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def read(path: str | os.PathLike[str]) -> Any:
    """Return what a weight file holds, on the CPU.

    Raises:
        CheckpointError, Exception: It is damaged, crafted or of another kind; call it below `explained`.
    """
    with open(path, 'rb') as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(512)
        file.seek(0)
        if head.startswith(b'PK'):
            return _read_archive(file, size)
        if head[8:9] == b'{':
            return _read_safetensors(path, int.from_bytes(head[:8], 'little'), size)
        if head[257:262] == b'ustar':
            raise CheckpointError(
                'is a tar archive, as torch wrote before version 0.2, and was not loaded, as unpacking one could write '
                'files; unpack it if it holds another file, or save it again with a newer torch.'
            )
        if head.startswith(b'\x80'):
            return _read_pickles(file, size)
    raise BadZipFile


def check_crcs(path: str | os.PathLike[str]) -> None:
    """Check every part of an archive of torch.save against its CRC; read other files.

    Raises:
        CheckpointError, Exception: See `read`.
    """
    with open(path, 'rb') as file:
        archived = file.read(2) == b'PK'
        if archived and _Archive.of(file, os.fstat(file.fileno()).st_size).file.testzip():
            raise BadZipFile
    if not archived:
        read(path)


def _storage(data: bytearray) -> torch.UntypedStorage:
    """Return a storage of these very bytes."""
    return (torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0)).untyped_storage()


def _fill(data: bytearray, file: IO[bytes]) -> None:
    """Read the next bytes of a file, part by part: the file of an archive makes a copy of each."""
    view = memoryview(data)
    for start in range(0, len(data), _CHUNK):
        part = file.read(len(view[start : start + _CHUNK]))
        if len(part) < len(view[start : start + _CHUNK]):
            raise EOFError
        view[start : start + _CHUNK] = part


class _Archive(NamedTuple):
    """A zip archive of torch.save whose members are stored as they are, and no more than the file has."""

    file: ZipFile
    root: str  # the folder that all members are in, and a slash

    @staticmethod
    def of(file: BinaryIO, size: int) -> _Archive:
        _check_directory(file, size)
        archive = ZipFile(file)
        members = archive.infolist()
        names = {member.filename for member in members}
        if any(member.compress_type != ZIP_STORED or member.flag_bits & 1 for member in members):
            raise CheckpointError(
                'is a compressed or encrypted zip archive, which torch.save never writes; unpack it first if it holds '
                'the file, else save it again.'
            )
        if sum(member.file_size for member in members) > size or len(names) < len(members):
            raise CheckpointError(f'holds more in its parts than its {size} bytes{TOO_LARGE}')
        roots = [name.removesuffix('data.pkl') for name in names if name.count('/') == 1 and name.endswith('/data.pkl')]
        if len(roots) != 1:
            raise CheckpointError(
                'is a zip archive, but none of torch.save; unpack it first if it holds the file, else give another.'
            )
        root = roots[0]
        if any(name == f'{root}constants.pkl' or name.startswith(f'{root}code/') for name in names):
            raise CheckpointError(
                'is a TorchScript program, which is code, and was not loaded; save the state_dict() of its model.'
            )
        order = f'{root}byteorder'
        if order in names and archive.getinfo(order).file_size < 16 and archive.read(order).decode() != sys.byteorder:
            raise CheckpointError(
                f'was saved on a machine of another byte order, expected {sys.byteorder}; save it again on one like '
                'this.'
            )
        return _Archive(archive, root)


def _check_directory(file: BinaryIO, size: int) -> None:
    """Check the size of the directory, before Python makes objects of it."""
    file.seek(max(0, size - 98))
    # The records at the end of the directory: of archives above 4 GB, where they are, and of all archives.
    tail = file.read(98).rjust(98)
    long = tail[56:60] == b'PK\6\7'
    if tail[76:80] != b'PK\5\6' or (long and tail[:4] != b'PK\6\6'):
        raise BadZipFile
    length = int.from_bytes(tail[40:48] if long else tail[88:92], 'little')
    if length > _LARGEST_DIRECTORY:
        raise CheckpointError(f'has a directory of {length} bytes, expected at most {_LARGEST_DIRECTORY}{TOO_LARGE}')


def _read_archive(file: BinaryIO, size: int) -> Any:
    archive, root = _Archive.of(file, size)
    stored: dict[str, torch.UntypedStorage] = {}

    def storage(key: str, least: int) -> torch.UntypedStorage:
        member = archive.getinfo(f'{root}data/{key}')
        if member.file_size < least:
            raise CheckpointError(f'promises {least} bytes where it has {member.file_size}{TOO_LARGE}')
        if key not in stored:
            data = bytearray(member.file_size)
            with archive.open(member) as part:
                _fill(data, part)
            stored[key] = _storage(data)
        return stored[key]

    pickled = archive.read(f'{root}data.pkl')
    return restored(Unpickler(Source(io.BytesIO(pickled), len(pickled)), size, storage).load())


def _read_pickles(file: BinaryIO, size: int) -> Any:
    stored: dict[str, bytearray] = {}
    left = size

    def storage(key: str, count: int) -> torch.UntypedStorage:
        nonlocal left
        if count > (len(stored[key]) if key in stored else left):
            raise CheckpointError(f'promises more values than its {size} bytes have room for{TOO_LARGE}')
        if key not in stored:
            left -= count
            stored[key] = bytearray(count)
        return _storage(stored[key])

    def load() -> Any:
        return Unpickler(Source(file, size), size, storage).load()

    if load() != _MAGIC or load() != _PROTOCOL or load()['little_endian'] != (sys.byteorder == 'little'):
        raise BadZipFile
    content = load()
    keys = load()
    if sorted(keys) != sorted(stored):
        raise BadZipFile
    for key in keys:
        # How many values there are; their size is known.
        count = int.from_bytes(file.read(8), sys.byteorder)
        if len(stored[key]) % max(count, 1) or bool(count) != bool(stored[key]):
            raise BadZipFile
        _fill(stored[key], file)
    return restored(content)


def _read_safetensors(path: str | os.PathLike[str], length: int, size: int) -> Any:
    if length > min(size - 8, _LARGEST_HEADER):
        raise CheckpointError(f'has a header of {length} bytes, expected at most {_LARGEST_HEADER}{TOO_LARGE}')
    from safetensors.torch import load_file

    tensors = load_file(path)
    with open(path, 'rb') as file:
        file.seek(8)
        json.loads(file.read(length), object_pairs_hook=_check_names)
    return {checked_key(name): value for name, value in tensors.items()}


def _check_names(entries: list[tuple[str, Any]]) -> None:
    """Refuse an object of JSON that has two entries of one name, of which readers take either."""
    if len({name for name, _ in entries}) < len(entries):
        raise CheckpointError('names a tensor twice, and was not loaded; save it again.')
