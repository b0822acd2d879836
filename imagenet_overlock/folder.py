"""Image folders: a folder for each split, in it a folder for each class, in it the images."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from timm.data.readers.img_extensions import is_img_extension
from timm.utils.misc import natural_key

from overlock.utils.errors import UserError

TRAIN = ('train',)
VAL = ('val', 'validation')


@dataclass(frozen=True)
class Split:
    """A split that was checked.

    Attributes:
        root: Its folder.
        classes: Names of the class folders, in the order of their indices.
        images: Number of images.
    """

    root: Path
    classes: tuple[str, ...]
    images: int


def check_folder(root: str | os.PathLike, batch: int = 1) -> tuple[Split, Split]:
    """Check an image folder for training.

    Args:
        root: Folder with `train/` and `val/` or `validation/`.
        batch: Images that an epoch must have at least.

    Returns:
        The splits to train and to validate on.

    Raises:
        UserError: If a split is missing or malformed, the classes differ between the splits, or there are too few
            images.
    """
    train, val = (check_split(_find(Path(root).expanduser(), names)) for names in (TRAIN, VAL))
    for split, other in ((train, val), (val, train)):
        alone = sorted(set(split.classes) - set(other.classes), key=natural_key)
        if alone:
            raise UserError(
                f'{train.root} and {val.root} must have the same classes, but only {split.root} has '
                f'{", ".join(alone[:3])}; add or remove what differs.'
            )
    if train.images < batch:
        raise UserError(
            f'{train.root} has {train.images} images, fewer than the {batch} of one update; lower --batch-size.'
        )
    return train, val


def check_validation_folder(root: str | os.PathLike) -> Split:
    """Check the split to validate on: `val/` or `validation/` of an image folder, or the folder itself.

    Raises:
        UserError: If it is missing or malformed.
    """
    root = Path(root).expanduser()
    is_split = root.is_dir() and not any((root / name).is_dir() for name in TRAIN + VAL)
    return check_split(root if is_split else _find(root, VAL))


def check_split(root: Path) -> Split:
    """Check that a folder has classes, each of them has images, and the first image of each can be decoded.

    Raises:
        UserError: If not.
    """
    names = [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith('.')]
    if not names:
        raise UserError(f'{root} has no folders of classes; expected {root}/CLASS/*.jpg.')
    # The key alone is the same for names that differ in leading zeros or capitals.
    classes = sorted(names, key=lambda name: (natural_key(name), name))
    # On network storage most of the time is latency.
    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(_check_class, [root / name for name in classes]))
    return Split(root, tuple(classes), sum(counts))


def _find(root: Path, names: tuple[str, ...]) -> Path:
    """Return the folder of a split that goes by one of these names."""
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        trouble = f'has no {" or ".join(f"{name}/" for name in names)}'
        if not root.is_dir():
            trouble = 'is not a folder' if root.exists() else 'does not exist'
        raise UserError(f'The image folder {root} {trouble}; expected train/CLASS/*.jpg and val/CLASS/*.jpg below it.')
    return found


def _check_class(folder: Path) -> int:
    """Return the number of images of a class."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_img_extension(Path(entry.name).suffix.lower())]
    if not names:
        nested = any(path.is_dir() for path in folder.iterdir())
        remedy = 'move those of its folders into it' if nested else 'fill it or remove it from both splits'
        raise UserError(f'The class folder {folder} has no images (.jpg, .jpeg, .png); {remedy}.')
    decode(folder / min(names, key=natural_key))
    return len(names)


def decode(path: str | os.PathLike) -> Image.Image:
    """Read an image as RGB.

    Raises:
        UserError: If it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return image.convert('RGB')
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f'The image {path} cannot be decoded ({error}); replace or remove it.') from None
