"""Draw shapes and textures: scenes with exact masks for detection, images of one class for classification."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SCENE_CLASSES = ('circle', 'square', 'triangle', 'star', 'ring')

# (corners, distance of an edge's middle from the center relative to a corner's); other shapes are round
_CORNERS = {'square': (4, np.cos(np.pi / 4)), 'triangle': (3, np.cos(np.pi / 3)), 'star': (5, 0.42)}
_RING_HOLE = 0.55
_MIN_VISIBLE = 0.45
_MIN_CONTRAST = 0.25
_RADII = (0.075, 0.24)
_SHAPES_PER_SCENE = (2, 5)
_TRIES = 40


@dataclass(frozen=True)
class Scene:
    """One drawn scene.

    Attributes:
        image: (size, size, 3), uint8, RGB.
        owner: (size, size), uint8; 0 is background, k the pixels where the k-th shape is visible.
        labels: Index into `SCENE_CLASSES` of shape 1, 2, ..., the front-most last.
    """

    image: np.ndarray
    owner: np.ndarray
    labels: tuple[int, ...]


def silhouette(
    name: str, center: tuple[float, float], radius: float, turn: float, size: int, subpixels: int
) -> np.ndarray:
    """Return which subpixels of a square image lie inside a shape: (size * subpixels, size * subpixels), bool.

    `center`, `radius` (of the corners) and `size` are in pixels, `turn` in radians.
    """
    steps = (np.arange(size * subpixels) + 0.5) / subpixels
    dx, dy = np.meshgrid(steps - center[0], steps - center[1])
    distance = np.hypot(dx, dy) / radius
    inside = distance <= 1
    if name in _CORNERS:
        inside[inside] = distance[inside] <= _outline(*_CORNERS[name], np.arctan2(dy[inside], dx[inside]) - turn)
    if name == 'ring':
        inside &= distance >= _RING_HOLE
    return inside


def _outline(corners: int, middle: float, angle: np.ndarray) -> np.ndarray:
    """Return the distance from the center to the edge in the directions `angle`; corners lie at distance 1."""
    half = np.pi / corners
    # The outline is symmetric: every direction folds onto the half edge from a corner to its middle.
    folded = half - np.abs(angle % (2 * half) - half)
    side = middle * np.sin(half)
    return side / (side * np.cos(folded) + (1 - middle * np.cos(half)) * np.sin(folded))


def draw_scene(rng: np.random.Generator, size: int, first_label: int) -> Scene:
    """Draw a textured ground, then shapes from back to front.

    A shape that would hide too much of an earlier one is placed elsewhere, so that every shape stays visible enough to
    be named. Colors say nothing about classes; `first_label` is that of the rear-most shape.
    """
    image, colors = _ground(rng, size)
    owner = np.zeros((size, size), np.uint8)
    labels: list[int] = []
    full_areas: list[int] = []
    for index in range(rng.integers(_SHAPES_PER_SCENE[0], _SHAPES_PER_SCENE[1] + 1)):
        label = first_label if index == 0 else int(rng.integers(len(SCENE_CLASSES)))
        cover = _place(rng, SCENE_CLASSES[label], owner, full_areas)
        if cover is None:
            continue
        mask = cover >= 0.5
        labels.append(label)
        full_areas.append(int(mask.sum()))
        owner[mask] = len(labels)
        colors.append(_contrasting_color(rng, colors))
        image = _paint(rng, image, cover, colors[-1])
    image = image + rng.normal(0, 0.015, image.shape)
    return Scene((image.clip(0, 1) * 255).round().astype(np.uint8), owner, tuple(labels))


def _place(rng: np.random.Generator, name: str, owner: np.ndarray, full_areas: list[int]) -> np.ndarray | None:
    """Return the part of every pixel that one more shape covers; None where `_TRIES` places all hide too much."""
    size = len(owner)
    low, high = np.log(_RADII)
    for _ in range(_TRIES):
        radius = size * np.exp(rng.uniform(low, high))
        center = tuple(rng.uniform(0.8 * radius, size - 0.8 * radius, 2))
        inside = silhouette(name, center, radius, rng.uniform(0, 2 * np.pi), size, 3)
        cover = inside.reshape(size, 3, size, 3).mean(axis=(1, 3), dtype=np.float32)
        visible = np.bincount(owner[cover < 0.5], minlength=len(full_areas) + 1)[1:]
        if np.all(visible >= _MIN_VISIBLE * np.array(full_areas)):
            return cover
    return None


def _ground(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return a muted ground of two mixed colors, (size, size, 3) float64 in [0, 1], and the two colors."""
    hue = rng.uniform()
    value = rng.uniform(0.25, 0.85)
    colors = [
        _rgb(hue, rng.uniform(0.1, 0.4), value),
        _rgb(hue + rng.uniform(-0.1, 0.1), rng.uniform(0.1, 0.4), value + rng.uniform(-0.15, 0.15)),
    ]
    mix = 0.5 + 0.35 * _smooth_noise(rng, size, 4) + 0.2 * _smooth_noise(rng, size, size // 6)
    mix = mix.clip(0, 1)[..., None]
    return colors[0] * mix + colors[1] * (1 - mix), colors


def _paint(rng: np.random.Generator, image: np.ndarray, cover: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Return the image with a shaded, striped shape and its soft shadow on it."""
    size = len(cover)
    shift = -size / 64
    soft = Image.fromarray((cover * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(size / 64))
    shadow = np.asarray(soft.transform(soft.size, Image.Transform.AFFINE, (1, 0, shift, 0, 1, shift))) / 255
    y, x = np.mgrid[:size, :size] / size - 0.5
    light, stripe = rng.uniform(0, 2 * np.pi, 2)
    shade = 1 + 0.25 * (x * np.cos(light) + y * np.sin(light))
    wave = 2 * np.pi * rng.uniform(6, 18) * (x * np.cos(stripe) + y * np.sin(stripe))
    shade = shade + rng.uniform(0, 0.14) * np.sin(wave) + 0.04 * _smooth_noise(rng, size, size // 4)
    surface = (color * shade[..., None]).clip(0, 1)
    image = image * (1 - 0.35 * shadow[..., None])
    return image + cover[..., None] * (surface - image)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Return (size, size) noise of unit deviation before smoothing, that varies over `size / cells` pixels."""
    grid = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC), np.float64)


def _contrasting_color(rng: np.random.Generator, taken: list[np.ndarray]) -> np.ndarray:
    """Return the first vivid color that differs enough from those taken, else the most different one met."""
    best, best_distance = np.zeros(3), -1.0
    for _ in range(_TRIES):
        color = _rgb(rng.uniform(), rng.uniform(0.5, 0.95), rng.uniform(0.55, 1.0))
        distance = min(float(np.abs(color - other).mean()) for other in taken)
        if distance > best_distance:
            best, best_distance = color, distance
        if distance >= _MIN_CONTRAST:
            break
    return best


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Return (3,) float64 in [0, 1]."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def draw_image(name: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw an image of one of `IMAGE_CLASSES` in random colors, with shade, noise and blots as on every class."""
    fine = 2 * size
    drawing = _DRAWINGS[name](rng, fine)
    ground, color = _two_colors(rng)
    pixels = np.where(drawing[..., None], color, ground)
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


def _two_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return two colors in [0, 255] that differ enough to tell a drawing from its ground."""
    while True:
        first, second = rng.uniform(0, 255, (2, 3))
        if np.abs(first - second).sum() > 300:
            return first, second


def _grid(rng: np.random.Generator, size: int, turn: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates in units of a texture's period, turned by `turn` degrees and a few at random."""
    angle = np.deg2rad(turn + rng.uniform(-8, 8))
    y, x = np.mgrid[:size, :size] / size
    periods = rng.uniform(3, 6)
    turned = (x * np.cos(angle) + y * np.sin(angle)) * periods, (y * np.cos(angle) - x * np.sin(angle)) * periods
    return turned[0] + rng.uniform(0, 1), turned[1] + rng.uniform(0, 1)


def _stripes(rng: np.random.Generator, size: int, turn: float) -> np.ndarray:
    across, _ = _grid(rng, size, turn + (90 * rng.integers(2) if turn == 45 else 0))
    return across % 1 < rng.uniform(0.35, 0.65)


def _checkerboard(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = _grid(rng, size)
    return (np.floor(x) + np.floor(y)) % 2 == 0


def _dots(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = _grid(rng, size, rng.uniform(0, 90))
    return np.hypot(x % 1 - 0.5, y % 1 - 0.5) < rng.uniform(0.22, 0.38)


def _rings(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    center = rng.uniform(0.25, 0.75, 2)
    return np.hypot(x - center[0], y - center[1]) * rng.uniform(4, 8) % 1 < rng.uniform(0.35, 0.65)


def _blotches(rng: np.random.Generator, size: int) -> np.ndarray:
    noise = Image.fromarray(rng.integers(0, 256, (size, size), np.uint8))
    smooth = np.asarray(noise.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.025, 0.045))), np.float32)
    return smooth > np.quantile(smooth, rng.uniform(0.4, 0.6))


def _shapes(rng: np.random.Generator, size: int, name: str) -> np.ndarray:
    """Return one shape near the middle, or two or three smaller ones, each in a quarter of its own."""
    count = rng.integers(1, 4)
    if count == 1:
        centers = rng.uniform(0.4, 0.6, (1, 2))
    else:
        quarters = rng.permutation([(0.27, 0.27), (0.27, 0.73), (0.73, 0.27), (0.73, 0.73)])[:count]
        centers = quarters + rng.uniform(-0.06, 0.06, (count, 2))
    inside = np.zeros((size, size), bool)
    for center in centers:
        radius = size * (rng.uniform(0.17, 0.25) if count > 1 else rng.uniform(0.25, 0.4))
        inside |= silhouette(name, tuple(center * size), radius, rng.uniform(0, 2 * np.pi), size, 1)
    return inside


# What is drawn in one color on a ground of another, by class.
_DRAWINGS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    'blotches': _blotches,
    'checkerboard': _checkerboard,
    'diagonal_stripes': partial(_stripes, turn=45),
    'dots': _dots,
    'horizontal_stripes': partial(_stripes, turn=90),
    'rings': _rings,
    'squares': partial(_shapes, name='square'),
    'stars': partial(_shapes, name='star'),
    'triangles': partial(_shapes, name='triangle'),
    'vertical_stripes': partial(_stripes, turn=0),
}
IMAGE_CLASSES = tuple(_DRAWINGS)
