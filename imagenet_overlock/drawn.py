"""A small image folder of drawn textures and shapes: the same bytes for the same parameters."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from overlock.utils.errors import UserError

# Changed with the drawing, so that a folder of an older drawing is drawn again.
_VERSION = 1
_STAMP = 'drawn.json'
_SUPERSAMPLING = 2


def _grid(size: int, rng: np.random.Generator, turn: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in the image, in units of a texture's period, turned by `turn` degrees and a few at random."""
    angle = np.deg2rad(turn + rng.uniform(-8, 8))
    y, x = np.mgrid[:size, :size] / size
    periods = rng.uniform(3, 6)
    turned = (x * np.cos(angle) + y * np.sin(angle)) * periods, (y * np.cos(angle) - x * np.sin(angle)) * periods
    return turned[0] + rng.uniform(0, 1), turned[1] + rng.uniform(0, 1)


def _stripes(turn: float) -> Callable[[int, np.random.Generator], np.ndarray]:
    def draw_stripes(size: int, rng: np.random.Generator) -> np.ndarray:
        across, _ = _grid(size, rng, turn + (90 * rng.integers(2) if turn == 45 else 0))
        return across % 1 < rng.uniform(0.35, 0.65)

    return draw_stripes


def _checkerboard(size: int, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(size, rng)
    return (np.floor(x) + np.floor(y)) % 2 == 0


def _dots(size: int, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(size, rng, rng.uniform(0, 90))
    return np.hypot(x % 1 - 0.5, y % 1 - 0.5) < rng.uniform(0.22, 0.38)


def _rings(size: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    center = rng.uniform(0.25, 0.75, 2)
    return np.hypot(x - center[0], y - center[1]) * rng.uniform(4, 8) % 1 < rng.uniform(0.35, 0.65)


def _blotches(size: int, rng: np.random.Generator) -> np.ndarray:
    noise = Image.fromarray(rng.integers(0, 256, (size, size), np.uint8).astype(np.uint8))
    smooth = np.asarray(noise.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.025, 0.045))), np.float32)
    return smooth > np.quantile(smooth, rng.uniform(0.4, 0.6))


def _polygons(corners: int, inner: float) -> Callable[[int, np.random.Generator], np.ndarray]:
    """One to three polygons; every second vertex lies at `inner` of the radius."""

    def draw_polygons(size: int, rng: np.random.Generator) -> np.ndarray:
        image = Image.new('1', (size, size))
        pen = ImageDraw.Draw(image)
        count = rng.integers(1, 4)
        for center in _centers(rng, count):
            radius = size * (rng.uniform(0.17, 0.25) if count > 1 else rng.uniform(0.25, 0.4))
            angles = rng.uniform(0, 2 * np.pi) + np.arange(2 * corners) * np.pi / corners
            radii = radius * np.where(np.arange(2 * corners) % 2, inner, 1)
            points = center * size + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
            pen.polygon([tuple(point) for point in points], fill=1)
        return np.asarray(image)

    return draw_polygons


def _centers(rng: np.random.Generator, count: int) -> np.ndarray:
    """A center in each of `count` quarters of the unit square; a single one is near its middle."""
    if count == 1:
        return rng.uniform(0.4, 0.6, (1, 2))
    quarters = rng.permutation([(0.27, 0.27), (0.27, 0.73), (0.73, 0.27), (0.73, 0.73)])[:count]
    return quarters + rng.uniform(-0.06, 0.06, (count, 2))


# What is drawn in one colour on a ground of another, by class.
_DRAWINGS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    'blotches': _blotches,
    'checkerboard': _checkerboard,
    'diagonal_stripes': _stripes(45),
    'dots': _dots,
    'horizontal_stripes': _stripes(90),
    'rings': _rings,
    'squares': _polygons(4, np.cos(np.pi / 4)),
    'stars': _polygons(5, 0.42),
    'triangles': _polygons(3, np.cos(np.pi / 3)),
    'vertical_stripes': _stripes(0),
}
CLASSES = tuple(_DRAWINGS)


def draw_image(name: str, size: int, rng: np.random.Generator) -> Image.Image:
    """One image of a class: the drawing in random colours, shaded, with noise and blots that are on every class.

    Args:
        name: One of `CLASSES`.
        size: Side in pixels.
        rng: What everything random is drawn from.
    """
    fine = size * _SUPERSAMPLING
    drawing = _DRAWINGS[name](fine, rng)
    ground, colour = _colours(rng)
    pixels = np.where(drawing[..., None], colour, ground)
    ramp = np.linspace(-0.5, 0.5, fine)
    slope = rng.uniform(-0.35, 0.35, 2)
    pixels *= (1 + ramp * slope[0] + ramp[:, None] * slope[1])[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 3)):
        center, radii = rng.uniform(0, fine, 2), rng.uniform(0.02, 0.07, 2) * fine
        pen.ellipse([*(center - radii), *(center + radii)], fill=tuple(rng.integers(0, 256, 3).tolist()))
    image = image.resize((size, size), Image.Resampling.BOX)
    noisy = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(1, 10), (size, size, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours that differ enough to tell a drawing from its ground."""
    while True:
        first, second = rng.uniform(0, 255, (2, 3))
        if np.abs(first - second).sum() > 300:
            return first, second


def draw(root: str | os.PathLike, train: int = 200, val: int = 40, size: int = 96, seed: int = 0) -> Path:
    """Draws the image folder, `train/` and `val/`, unless it is there with the same parameters.

    Args:
        root: Folder to write. It appears whole or not at all; one drawn with other parameters is replaced.
        train: Training images of each class.
        val: Validation images of each class.
        size: Side of the images in pixels.
        seed: Seed of the drawing.

    Returns:
        `root`.

    Raises:
        UserError: If a number is out of range, or `root` holds something else than a drawn image folder.
    """
    if min(train, val) < 1 or size < 32:
        raise UserError(
            'The drawn image folder needs at least 1 image of each class in each split, and 32 pixels, got '
            f'train={train}, val={val}, size={size}.'
        )
    root = Path(root)
    parameters = dict(version=_VERSION, train=train, val=val, size=size, seed=seed)
    if _is_complete(root, parameters):
        return root
    if root.exists() and not is_drawn(root) and any(root.iterdir()):
        raise UserError(f'{root} holds other files than a drawn image folder; name another folder.')
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as scratch:
        new = Path(scratch, 'new')
        for split, (name, count) in enumerate(dict(train=train, val=val).items()):
            for label, kind in enumerate(CLASSES):
                folder = new / name / kind
                folder.mkdir(parents=True)
                for index in range(count):
                    # A generator for each image, so that it doesn't depend on how many there are.
                    rng = np.random.default_rng((seed, split, label, index))
                    draw_image(kind, size, rng).save(folder / f'{index:04d}.png')
        (new / _STAMP).write_text(json.dumps(parameters) + '\n')
        if root.exists():
            shutil.move(root, Path(scratch, 'old'))
        os.replace(new, root)
    return root


def is_drawn(root: str | os.PathLike) -> bool:
    """Whether an image folder drawn by `draw` lies there, with whatever parameters."""
    return Path(root, _STAMP).is_file()


def _is_complete(root: Path, parameters: dict[str, int]) -> bool:
    try:
        if json.loads((root / _STAMP).read_text()) != parameters:
            return False
    except (OSError, ValueError):
        return False
    return all(
        len(list((root / split / name).glob('*.png'))) == parameters[split]
        for split in ('train', 'val')
        for name in CLASSES
    )


def contact_sheet(columns: int = 8, size: int = 96, seed: int = 0) -> Image.Image:
    """A picture of the first training images, a row for each class in the order of `CLASSES`."""
    gap = 4
    sheet = Image.new('RGB', tuple(count * (size + gap) + gap for count in (columns, len(CLASSES))), 'white')
    for label, kind in enumerate(CLASSES):
        for index in range(columns):
            image = draw_image(kind, size, np.random.default_rng((seed, 0, label, index)))
            sheet.paste(image, tuple(position * (size + gap) + gap for position in (index, label)))
    return sheet
