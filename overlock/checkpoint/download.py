"""Downloading a file, so that it is there whole and as published or not at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from filelock import FileLock
from torch.hub import tqdm

from overlock.utils.distributed import local_rank
from overlock.utils.errors import CheckpointError

TIMEOUT = 60
_CHUNK = 1 << 20


def download(url: str, path: str | os.PathLike, size: int | None = None, sha256: str | None = None) -> None:
    """Downloads a file, with progress, unless it is there; of several processes one does and the others wait.

    What came before a break stays beside `path` with the suffix `.part`, and the next attempt goes on from there if the
    server says that the file is still the same. The file takes its name once its length is what the server announced,
    and size and hash are what they should be.

    Args:
        url: HTTP or HTTPS address.
        path: Where the file goes; folders above it are made.
        size: Bytes, where they are known.
        sha256: Hash, or its first digits, where it is known; by default that in a name like torch hub's,
            `weights-0123abcd.pth`.

    Raises:
        CheckpointError: If the file is not as it should be; nothing of it is kept.
        OSError: If the server cannot be reached, or the connection broke and no more came at the next attempt.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    with FileLock(f'{part}.lock'):
        if path.is_file():
            return
        reached = 0
        known = size is not None or sha256 is not None
        while not _fetch(url, part, known):
            before, reached = reached, part.stat().st_size
            if reached <= before:
                raise ConnectionError(f'the connection broke after {reached} bytes, and again')
        try:
            _check(part, url, size, sha256 or _hash_in(path.name))
        except CheckpointError:
            part.unlink()
            raise
        finally:
            _validator_of(part).unlink(missing_ok=True)
        os.replace(part, path)
    Path(f'{part}.lock').unlink(missing_ok=True)


def _fetch(url: str, part: Path, known: bool) -> bool:
    """Appends to what there is of a file what the server sends, and returns whether it is whole now.

    Args:
        url: Address.
        part: What there is.
        known: Whether size or hash will tell a whole file.
    """
    validator = _validator_of(part)
    begun = part.stat().st_size if part.is_file() and validator.is_file() else 0
    headers = {'User-Agent': 'overlock'}
    if begun:
        headers |= {'Range': f'bytes={begun}-', 'If-Range': validator.read_text()}
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not begun:
            raise
        # The file ends before what we have: it is another one.
        validator.unlink()
        return False
    with response:
        if response.status != 206:
            begun = 0
        elif not (response.headers.get('Content-Range') or '').startswith(f'bytes {begun}-'):
            raise ConnectionError('the server sent another part of the file than was asked for')
        _remember(validator, response.headers)
        length = response.headers.get('Content-Length')
        if length is None and not known and not response.chunked:
            raise ConnectionError('the server does not tell the length of the file, so that a whole one cannot be told')
        total = None if length is None else begun + int(length)
        with (
            part.open('ab' if begun else 'wb') as file,
            tqdm(
                desc=part.stem,
                total=total,
                initial=begun,
                unit='B',
                unit_scale=True,
                unit_divisor=1024,
                mininterval=0.1 if sys.stderr.isatty() else 30,
                disable=local_rank() != 0,
            ) as bar,
        ):
            try:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            except (http.client.HTTPException, ConnectionError, TimeoutError):
                return False
    return total is None or part.stat().st_size == total


def _validator_of(part: Path) -> Path:
    """The file that says which version of the published file a part is of."""
    return part.with_name(f'{part.name}.version')


def _remember(validator: Path, headers: http.client.HTTPMessage) -> None:
    """Keeps what the server can tell the version by; without it a part cannot be gone on with."""
    tag = headers.get('ETag')
    version = tag if tag and not tag.startswith('W/') else headers.get('Last-Modified')
    if version:
        validator.write_text(version)
    else:
        validator.unlink(missing_ok=True)


def _hash_in(name: str) -> str | None:
    # Digits alone are rather a date.
    found = re.search(r'-(?=\d*[a-f])([0-9a-f]{8,64})\.', name)
    return found and found[1]


def _check(part: Path, url: str, size: int | None, sha256: str | None) -> None:
    name = Path(urlparse(url).path).name
    received = part.stat().st_size
    with part.open('rb') as file:
        head = file.read(9)
    # A zip archive or a pickle, as torch writes them, or the JSON of safetensors behind its length.
    if not head.startswith((b'PK', b'\x80')) and head[8:] != b'{':
        raise CheckpointError(
            f'{name} from {url} is no weight file: expected one of torch.save or safetensors, got '
            f'{received} bytes that begin with {head!r}; look at the address with a browser.'
        )
    if size is not None and received != size:
        raise CheckpointError(
            f'{name} from {url} is not the published file: expected {size} bytes, got {received}; '
            'fetch it from somewhere else.'
        )
    if sha256 is not None:
        digest = hashlib.sha256()
        with part.open('rb') as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if not digest.hexdigest().startswith(sha256):
            raise CheckpointError(
                f'{name} from {url} is not the published file: expected SHA-256 {sha256}, got '
                f'{digest.hexdigest()}; fetch it from somewhere else.'
            )
