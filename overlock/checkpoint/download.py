"""Find weight files: on this machine, in torch hub's cache, or by a download that is whole and as published."""

from __future__ import annotations

import difflib
import http.client
import os
import re
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from torch.hub import tqdm

from overlock.checkpoint.registry import REFUSED, WEIGHTS
from overlock.utils.distributed import local_rank
from overlock.utils.errors import CheckpointError
from overlock.utils.files import keep_hash, kept_hash, sha256_of

WEIGHTS_VARIABLE = 'OVERLOCK_WEIGHTS'
HTTP_VARIABLE = 'OVERLOCK_ALLOW_HTTP'
TIMEOUT = 60


def find_file(source: str | os.PathLike[str]) -> Path:
    """Return the local file of published weights, of a path, or of a URL.

    Names in `overlock.checkpoint.WEIGHTS` stand for their URLs. For a URL, look for a file of its name in the folder
    that `OVERLOCK_WEIGHTS` names, then in torch hub's cache, and else download it into that cache: from the URL itself,
    or, if the file is published and `OVERLOCK_WEIGHTS` is the URL of a folder, from there.

    Raises:
        CheckpointError: If there is no such file, or it cannot be downloaded.
    """
    source = os.fspath(source)
    path = Path(os.path.expanduser(source))
    if path.name in REFUSED:
        raise CheckpointError(f'{source} fits no network here: {REFUSED[path.name]}')
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        raise CheckpointError(f'{path} is a folder, expected a weight file; give the path of a file in it.')
    url = WEIGHTS[source].url if source in WEIGHTS else source
    if not _is_url(url):
        close = difflib.get_close_matches(source, WEIGHTS, 3)
        raise CheckpointError(
            f'The weight file {path} does not exist; give the path of a file, a URL, or a name of '
            f'published weights, such as {", ".join(close or list(WEIGHTS)[:1])}.'
        )
    name = Path(url.partition('?')[0]).name
    cached = Path(torch.hub.get_dir(), 'checkpoints', name)
    place = os.environ.get(WEIGHTS_VARIABLE, '')
    if place and not _is_url(place):
        folder = Path(os.path.expanduser(place))
        if not folder.is_dir():
            raise CheckpointError(
                f'{WEIGHTS_VARIABLE} must name a folder of weight files, or the URL of one, got '
                f'{place}, which is neither; correct or unset it.'
            )
        if (folder / name).is_file():
            return folder / name
    published = next((weights for weights in WEIGHTS.values() if weights.url == url), None)
    if published and _is_url(place):
        url = f'{place.rstrip("/")}/{name}'
    try:
        download(url, cached, published.sha256 if published else None)
    except CheckpointError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CheckpointError(
            f'cannot download {url} ({error}); try again, or fetch {name} by other means and put it into the folder '
            f'that {WEIGHTS_VARIABLE} names, or at {cached}'
        ) from None
    return cached


def _is_url(text: str) -> bool:
    return text.lower().startswith(('http://', 'https://'))


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Download a file, with progress, unless it is there; one of several processes does, and the others wait.

    A part that came before a break stays beside `path` with the suffix `.part`, and the next attempt continues it if
    the server says that the file is still the same. The file takes its name once it is whole and its hash is right:
    `sha256`, in full or its first digits, by default those in a name like torch hub's, `weights-0123abcd.pth`. Its
    SHA-256 is kept beside it, and checked wherever the file is used again.

    Raises:
        CheckpointError: If the file is not as it should be; nothing of it is kept.
        OSError: If the server cannot be reached, or the connection broke and no more came at the next attempt.
    """
    # Digits alone are rather a date.
    in_name = re.search(r'-(?=\d*[a-f])([0-9a-f]{8,64})\.', path.name)
    sha256 = sha256 or (in_name[1] if in_name else '')
    if path.is_file():
        _check_kept(path, sha256)
        return
    if url.lower().startswith('http://') and len(sha256) < 16 and os.environ.get(HTTP_VARIABLE) != '1':
        raise CheckpointError(
            f'{url} is not encrypted and has no known SHA-256, so that others on the way could change the file; give '
            f'an address with https://, or set {HTTP_VARIABLE}=1 to trust the network.'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part, version, lock = (
        path.with_name(f'{path.name}{suffix}') for suffix in ('.part', '.part.version', '.part.lock')
    )
    with FileLock(lock):
        if path.is_file():
            return
        reached = 0
        while not _fetch(url, part, version):
            before, reached = reached, part.stat().st_size
            if reached <= before:
                raise ConnectionError(f'the connection broke after {reached} bytes, and again')
        version.unlink(missing_ok=True)
        try:
            keep_hash(path, _check(part, url, sha256))
        except CheckpointError:
            part.unlink()
            raise
        os.replace(part, path)
    lock.unlink(missing_ok=True)


def _fetch(url: str, part: Path, version: Path) -> bool:
    """Append to a part what the server sends, and return whether the file is whole now.

    The part is started again unless the server still has the version of the file that is noted in `version`.
    """
    seen = version.read_text() if version.is_file() else ''
    begun = part.stat().st_size if seen and part.is_file() else 0
    headers = {'User-Agent': 'overlock'} | ({'Range': f'bytes={begun}-', 'If-Range': seen} if begun else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not begun:
            raise
        # The file ends before the part does, so it is another one.
        version.unlink()
        return False
    with response:
        if url.lower().startswith('https://') and not response.url.lower().startswith('https://'):
            raise ConnectionError(f'the server sends on to {response.url}, which is not encrypted')
        if response.status != 206:
            begun = 0
        length = response.headers.get('Content-Length')
        if length is None:
            raise ConnectionError(
                'the server does not tell the length of the file, so that a cut one would pass for whole'
            )
        total = begun + int(length)
        progress = tqdm(
            desc=part.stem,
            total=total,
            initial=begun,
            unit='B',
            unit_scale=True,
            unit_divisor=1024,
            mininterval=0.1 if sys.stderr.isatty() else 30,
            disable=local_rank() != 0,
        )
        with part.open('ab' if begun else 'wb') as file, progress as bar:
            tag = response.headers.get('ETag', 'W/')
            # Weak tags do not promise the same bytes.
            version.write_text(response.headers.get('Last-Modified', '') if tag.startswith('W/') else tag)
            try:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
            except (http.client.HTTPException, ConnectionError, TimeoutError):
                return False
    return part.stat().st_size == total


def _check_kept(path: Path, sha256: str) -> None:
    expected = sha256 or kept_hash(path)
    if expected and not sha256_of(path).startswith(expected):
        raise CheckpointError(
            f'{path} is not the file that was downloaded: expected SHA-256 {expected}, got {sha256_of(path)}; remove '
            'it, and it is downloaded again.'
        )


def _check(part: Path, url: str, sha256: str) -> str:
    """Return the SHA-256 of a download."""
    with part.open('rb') as file:
        head = file.read(9)
        # torch writes a zip archive or a pickle; safetensors writes JSON behind its length.
        if not head.startswith((b'PK', b'\x80')) and head[8:] != b'{':
            raise CheckpointError(
                f'the file from {url} is no weight file: expected one of torch.save or safetensors, got '
                f'{part.stat().st_size} bytes that begin with {head!r}; look at the address with a browser.'
            )
    digest = sha256_of(part)
    if not digest.startswith(sha256):
        raise CheckpointError(
            f'the file from {url} is not the published one: expected SHA-256 {sha256}, got {digest}; fetch it from '
            'somewhere else.'
        )
    return digest
