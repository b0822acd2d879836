"""Read what image files say about themselves, many at once."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

T = TypeVar('T')

MISSING = 'does not exist'
# More than processors: on network storage most threads wait.
THREADS, CHUNK = 16, 64
# What is not read by then (in s) stays unread: headers are cheap on local disks, and elsewhere not.
TIME_LIMIT = 600.0
# Images whose pixels are decoded too.
SAMPLE = 64
# The formats that OpenCV, mmcv's reader, decodes; MPO is JPEG.
FORMATS = ('BMP', 'JPEG', 'JPEG2000', 'MPO', 'PNG', 'PPM', 'TIFF', 'WEBP')
ENDS = {'JPEG': b'\xff\xd9', 'MPO': b'\xff\xd9', 'PNG': b'IEND'}
TAIL = 4096
# Of these, OpenCV applies the EXIF orientation.
ORIENTED = ('JPEG', 'MPO', 'PNG')
EXIF_ORIENTATION = 0x0112


class ImageFile(NamedTuple):
    """What is known about an image file.

    Attributes:
        size: (width, height) as stored, in pixels.
        orientation: By EXIF, 1 (upright) to 8; from 5 on, width and height change places.
        mode: Pillow's, which gives channels and bits.
        values: Of a label map: the values that occur, in ascending order.
        counts: How many pixels have each of them.
        problem: Why the file cannot be decoded, or ''.
    """

    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    mode: str = ''
    values: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    problem: str = ''

    def loaded_size(self, rotate: bool) -> tuple[int, int]:
        """Return (width, height) as loaded, with or without the rotation that EXIF asks for."""
        width, height = self.size
        return (height, width) if rotate and self.orientation >= 5 else (width, height)


def scan(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size (bytes) and time of change (ns) of all files below a folder, by relative path; of a file, its own."""
    found, seen = {}, set()
    if folder.is_file():
        return {'': (folder.stat().st_size, folder.stat().st_mtime_ns)}
    for path, folders, names in os.walk(folder, followlinks=True):
        # Links may form circles.
        seen.add(os.path.realpath(path))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(path, name)) not in seen]
        relative = os.path.relpath(path, folder).replace(os.sep, '/')
        for name in names:
            try:
                status = os.stat(os.path.join(path, name))
            except OSError:
                continue
            found[name if relative == '.' else f'{relative}/{name}'] = (status.st_size, status.st_mtime_ns)
    return found


def read_image(path: str | Path, pixels: bool = False, values: bool = False) -> ImageFile:
    """Read the header of an image, and its pixels where the end of the file lacks.

    Args:
        path: A file of any format.
        pixels: Decode the pixels anyway.
        values: Collect the values of the pixels; the file is a label map.
    """
    try:
        with open(path, 'rb') as file:
            if not os.fstat(file.fileno()).st_size:
                return ImageFile(problem='is empty')
            with Image.open(file) as image:
                if image.format not in FORMATS:
                    return ImageFile(problem=f'has the format {image.format}, which OpenCV does not read')
                orientation = image.getexif().get(EXIF_ORIENTATION, 1) if _is_oriented(image) else 1
                orientation = orientation if orientation in range(1, 9) else 1
                if pixels or values or not _is_ended(file, image.format):
                    image.load()
                found = _values(image) if values and len(image.getbands()) == 1 else {}
                return ImageFile(image.size, orientation, image.mode, tuple(found), tuple(found.values()))
    except FileNotFoundError:
        return ImageFile(problem=MISSING)
    except UnidentifiedImageError:
        return ImageFile(problem='is not an image')
    except Image.DecompressionBombError:
        # OpenCV reads larger ones than Pillow.
        return ImageFile()
    # A decoder may raise anything on a broken file.
    except Exception as error:
        return ImageFile(problem=f'cannot be read ({getattr(error, "strerror", None) or error})')


def _is_oriented(image: Image.Image) -> bool:
    # Without `exif` here, Pillow decodes a whole PNG to look for it.
    return image.format in ORIENTED and 'exif' in image.info


def _is_ended(file: BinaryIO, kind: str) -> bool:
    """Look for the mark at the end of a file, and leave the file where it was; what follows the mark may be long."""
    place = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
    ended = ENDS.get(kind, b'') in file.read()
    file.seek(place)
    return ended


def _values(image: Image.Image) -> dict[int, int]:
    """Return how many pixels have each value."""
    if image.mode in ('L', 'P'):
        return {value: count for value, count in enumerate(image.histogram()) if count}
    values, counts = np.unique(np.asarray(image), return_counts=True)
    return dict(zip(values.astype(int).tolist(), counts.tolist(), strict=True))


def read_images(folder: Path, names: Sequence[str]) -> dict[str, ImageFile]:
    """Return what the headers of images say, by name, and whether a sample of them decodes."""
    found = _read_all(folder, names, read_image, 'Checking images')
    sample = random.Random(0).sample(sorted(found), min(SAMPLE, len(found)))
    return found | _read_all(folder, sample, partial(read_image, pixels=True), 'Decoding a sample')


def read_maps(folder: Path, names: Sequence[str]) -> dict[str, ImageFile]:
    """Return what label maps hold, by name."""
    return _read_all(folder, names, partial(read_image, values=True), 'Checking label maps')


def _read_all(folder: Path, names: Sequence[str], read: Callable[[str], T], title: str) -> dict[str, T]:
    """Read files with threads, in random order so that those read by the end of the time are a sample."""
    order = random.Random(0).sample(names, len(names))
    chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
    end = time.monotonic() + TIME_LIMIT

    def read_chunk(chunk: list[str]) -> list[T]:
        return [read(os.path.join(folder, name)) for name in chunk] if time.monotonic() < end else []

    found: dict[str, T] = {}
    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=len(order), desc=title, delay=1, unit=' files') as progress:
        for chunk, results in zip(chunks, pool.map(read_chunk, chunks), strict=True):
            found.update(zip(chunk, results, strict=False))
            progress.update(len(chunk))
    return found


def check_files(files: Mapping[str, ImageFile], expected: int, found: dict[str, list[str]]) -> None:
    """Add the files that are missing, broken, or, beyond those, unread to what was found."""
    for name, file in sorted(files.items()):
        if file.problem == MISSING:
            found['missing'].append(name)
        elif file.problem:
            found['broken'].append(f'{name} {file.problem}')
    if len(files) < expected:
        found['unread'].append(f'{expected - len(files)} of {expected}')
