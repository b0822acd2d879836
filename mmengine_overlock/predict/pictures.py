"""Find and read images and videos."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from mmengine_overlock.data.files import read_image, scan
from overlock.utils.errors import UserError
from overlock.utils.files import IMAGE_SUFFIXES

_VIDEOS = ('.avi', '.mkv', '.mov', '.mp4', '.webm')
# What a run writes: files, and folders of images beside them.
RESULTS, RESULT_FOLDERS = ('predictions.json', 'labels.json'), ('labels', 'pictures')
# Headers of some containers estimate the number of frames; a video with fewer than this share of them is cut off.
_SHARE = 0.9


@dataclass(frozen=True)
class Picture:
    """An image to predict.

    Attributes:
        source: The file of the image or of its video.
        pixels: (H, W, 3), uint8, in the order blue, green, red; upright, as the file's EXIF says.
        frame: Number of the frame in a video, from 0; None for an image.
    """

    source: Path
    pixels: np.ndarray
    frame: int | None = None


@dataclass
class Pictures:
    """The images below files, folders, patterns, and in videos, read one after another.

    A folder stands for the images and videos in it and in its folders, sorted, without hidden ones.

    Attributes:
        inputs: What was asked for.
        root: The folder around all files.
        unreadable: The files that could not be decoded and why, filled while the images are read.

    Raises:
        UserError: An input does not exist, there is nothing to predict, or a folder holds pictures that an earlier run
            drew.
    """

    inputs: Sequence[str | Path]
    unreadable: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        files: dict[str, Path] = {}
        for file in (file for name in self.inputs for file in _files(str(name))):
            files.setdefault(os.path.abspath(file), file)
        if not files:
            raise UserError('There is nothing to predict; give images, videos, or folders or patterns of them.')
        self.files = [*files.values()]
        self.root = Path(os.path.commonpath([os.path.dirname(file) for file in files]))

    def __len__(self) -> int:
        """Return the number of images and frames, as far as the headers tell."""
        return sum(_count_frames(file) if _is_video(file) else 1 for file in self.files)

    def __iter__(self) -> Iterator[Picture]:
        for file in self.files:
            yield from self._video(file) if _is_video(file) else self._image(file)

    def _image(self, file: Path) -> Iterator[Picture]:
        # OpenCV fills what lacks of a broken file with gray.
        if problem := read_image(file).problem:
            self.unreadable[file] = problem
            return
        try:
            # Unlike cv2.imread, this takes a name of any letters. As mmcv's reader, it turns images as their EXIF says.
            pixels = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error as error:
            self.unreadable[file] = f'cannot be decoded ({error.err})'
            return
        if pixels is None:
            self.unreadable[file] = 'cannot be decoded'
        else:
            yield Picture(file, pixels)

    def _video(self, file: Path) -> Iterator[Picture]:
        expected, number = _count_frames(file), 0
        video = cv2.VideoCapture(str(file))
        while (read := video.read())[0]:
            yield Picture(file, read[1], number)
            number += 1
        video.release()
        if number < max(1, _SHARE * expected):
            self.unreadable[file] = f'ends after {number} of {expected} frames' if number else 'is no video'


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in _VIDEOS


def _count_frames(file: Path) -> int:
    return max(0, int(cv2.VideoCapture(str(file)).get(cv2.CAP_PROP_FRAME_COUNT)))


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    # Neither takes what is hidden.
    found = _below(path) if path.is_dir() else [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
    found = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES + _VIDEOS and file.is_file()]
    if not found:
        kinds = ', '.join(IMAGE_SUFFIXES + _VIDEOS)
        raise UserError(f'{name} is no image, video, or folder or pattern of them; expected files that end in {kinds}.')
    return found


def _below(folder: Path) -> list[Path]:
    """Return the files of a folder and of its folders, sorted."""
    names = sorted(name for name in scan(folder) if '/.' not in f'/{name}')
    for name in names:
        above, _, own = name.rpartition('/')
        written = tuple(os.path.join(above, other, '') for other in RESULT_FOLDERS)
        if own in RESULTS and any(other.startswith(written) for other in names):
            raise UserError(
                f'{folder / name} is of an earlier run, whose pictures would be predicted, too; move its results out '
                f'of {folder}, or give a pattern, as {folder / "*.jpg"}.'
            )
    return [folder / name for name in names]
