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
_LAYOUT = 'expected train/CLASS/*.jpg and val/CLASS/*.jpg below it'


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


@dataclass(frozen=True)
class ImageFolder:
    """The two splits that a training run needs."""

    train: Split
    val: Split


def check_folder(root: str | os.PathLike, batch: int = 1) -> ImageFolder:
    """Checks an image folder for training.

    Args:
        root: Folder with `train/` and `val/` or `validation/`.
        batch: Images that an epoch must at least have.

    Raises:
        UserError: If a split is missing or malformed, the classes differ between the splits, or there are too few
            images.
    """
    root = _existing(root)
    folder = ImageFolder(check_split(_split(root, TRAIN)), check_split(_split(root, VAL)))
    only_train, only_val = (
        set(a.classes) - set(b.classes) for a, b in ((folder.train, folder.val), (folder.val, folder.train))
    )
    if only_train or only_val:
        raise UserError(
            f'{folder.train.root} and {folder.val.root} must have the same classes, but '
            f'{_some(only_train)} only in the first and {_some(only_val)} only in the second.'
        )
    if folder.train.images < batch:
        raise UserError(
            f'{folder.train.root} has {folder.train.images} images, fewer than the {batch} of one update; '
            'lower --batch-size.'
        )
    return folder


def check_validation_folder(root: str | os.PathLike) -> Split:
    """Checks the split to validate on: `val/` or `validation/` of an image folder, or the folder itself.

    Raises:
        UserError: If it is missing or malformed.
    """
    root = _existing(root)
    found = [root / name for name in VAL if (root / name).is_dir()]
    if not found and (root / TRAIN[0]).is_dir():
        _split(root, VAL)
    return check_split(found[0] if found else root)


def check_split(root: Path) -> Split:
    """Checks that a folder has classes, each of these images, and the first image of each can be decoded.

    Raises:
        UserError: If that is not so.
    """
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.')]
    if not names:
        raise UserError(f'{root} has no folders of classes; expected {root}/CLASS/*.jpg.')
    # Names that differ in leading zeros or capitals alone are equal to timm.
    classes = sorted(names, key=lambda name: (natural_key(name), name))
    # Latency of network storage, not computing, is what takes time here.
    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(_check_class, [root / name for name in classes]))
    return Split(root, tuple(classes), sum(counts))


def _existing(root: str | os.PathLike) -> Path:
    root = Path(root).expanduser()
    if not root.is_dir():
        trouble = 'is not a folder' if root.exists() else 'does not exist'
        raise UserError(f'The image folder {root} {trouble}; {_LAYOUT}.')
    return root


def _split(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(f'The image folder {root} has no {" or ".join(f"{name}/" for name in names)}; {_LAYOUT}.')


def _check_class(folder: Path) -> int:
    """The number of images of a class."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_img_extension(Path(entry.name).suffix.lower())]
    if not names:
        nested = any(path.is_dir() for path in folder.iterdir())
        raise UserError(
            f'The class folder {folder} has no images (.jpg, .jpeg, .png)'
            + (
                ' but folders; images must lie in it directly.'
                if nested
                else '; fill it or remove it from both splits.'
            )
        )
    first = folder / min(names, key=natural_key)
    try:
        with Image.open(first) as image:
            image.convert('RGB')
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f'The image {first} cannot be decoded ({error}); replace or remove it.') from error
    return len(names)


def _some(names: set[str]) -> str:
    if not names:
        return 'none is'
    shown = sorted(names, key=natural_key)[:3]
    return f'{", ".join(shown)}{", ..." if len(names) > 3 else ""} {"is" if len(names) == 1 else "are"}'
