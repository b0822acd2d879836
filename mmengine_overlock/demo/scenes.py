"""Scenes of geometric shapes: overlapping, of many sizes, textured, with exact visible masks."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

CLASSES = ('circle', 'square', 'triangle', 'star', 'ring')

# (corners, distance of an edge's middle from the center relative to a corner's); None is round
_OUTLINES = {
    'circle': None,
    'square': (4, np.cos(np.pi / 4)),
    'triangle': (3, np.cos(np.pi / 3)),
    'star': (5, 0.42),
    'ring': None,
}
_RING_HOLE = 0.55
_SUBPIXELS = 3
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
        labels: Index into `CLASSES` of shape 1, 2, ..., the front-most last.
    """

    image: np.ndarray
    owner: np.ndarray
    labels: tuple[int, ...]

    def semantic_map(self) -> np.ndarray:
        """(size, size), uint8: 0 is background, c + 1 a visible pixel of `CLASSES[c]`."""
        return np.array((0, *(label + 1 for label in self.labels)), np.uint8)[self.owner]


def outline(name: str, angle: np.ndarray) -> np.ndarray:
    """Distance from the center to the edge of a shape whose corners lie at distance 1.

    Args:
        name: One of `CLASSES`.
        angle: Directions in radians, any shape.

    Returns:
        Distances, shaped as `angle`.
    """
    if _OUTLINES[name] is None:
        return np.ones_like(angle)
    corners, middle = _OUTLINES[name]
    half = np.pi / corners
    # the outline is symmetric: every direction folds onto the half edge from a corner to its middle
    folded = half - np.abs(angle % (2 * half) - half)
    side = middle * np.sin(half)
    return side / (side * np.cos(folded) + (1 - middle * np.cos(half)) * np.sin(folded))


def coverage(name: str, center: tuple[float, float], radius: float, turn: float, size: int) -> np.ndarray:
    """Part of every pixel that a shape covers.

    Args:
        name: One of `CLASSES`.
        center: (x, y) in pixels.
        radius: Distance of the corners from the center in pixels.
        turn: Rotation in radians.
        size: Side of the square canvas in pixels.

    Returns:
        (size, size), float32 in [0, 1].
    """
    steps = (np.arange(size * _SUBPIXELS) + 0.5) / _SUBPIXELS
    dx, dy = np.meshgrid(steps - center[0], steps - center[1])
    distance = np.hypot(dx, dy) / radius
    inside = distance <= 1
    inside[inside] = distance[inside] <= outline(name, np.arctan2(dy[inside], dx[inside]) - turn)
    if name == 'ring':
        inside &= distance >= _RING_HOLE
    blocks = inside.reshape(size, _SUBPIXELS, size, _SUBPIXELS)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def draw_scene(rng: np.random.Generator, size: int, first_label: int) -> Scene:
    """Draws one scene: a textured ground, then shapes from back to front.

    A shape that would hide too much of an earlier one is placed elsewhere, so every shape that can be seen at all
    is visible enough to be named. Colors say nothing about classes.

    Args:
        rng: Source of all randomness.
        size: Side of the square image in pixels.
        first_label: Class of the rear-most shape.

    Returns:
        The scene.
    """
    image, colors = _ground(rng, size)
    owner = np.zeros((size, size), np.uint8)
    labels: list[int] = []
    full_areas: list[int] = []
    for index in range(rng.integers(_SHAPES_PER_SCENE[0], _SHAPES_PER_SCENE[1] + 1)):
        label = first_label if index == 0 else int(rng.integers(len(CLASSES)))
        cover = _place(rng, CLASSES[label], owner, full_areas)
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
    """Finds room for one more shape; None where `_TRIES` random places all hide too much."""
    size = len(owner)
    low, high = np.log(_RADII)
    for _ in range(_TRIES):
        radius = size * np.exp(rng.uniform(low, high))
        center = tuple(rng.uniform(0.8 * radius, size - 0.8 * radius, 2))
        cover = coverage(name, center, radius, rng.uniform(0, 2 * np.pi), size)
        left = owner[cover < 0.5]
        visible = np.bincount(left, minlength=len(full_areas) + 1)[1:]
        if np.all(visible >= _MIN_VISIBLE * np.array(full_areas)):
            return cover
    return None


def _ground(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A muted ground of two mixed colors: (size, size, 3) float64 in [0, 1], and the two colors."""
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
    """Lays a shaded, striped shape and its soft shadow over the image."""
    size = len(cover)
    shift = -size / 64
    shadow = Image.fromarray((cover * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(size / 64))
    shadow = np.asarray(shadow.transform(shadow.size, Image.Transform.AFFINE, (1, 0, shift, 0, 1, shift))) / 255
    y, x = np.mgrid[:size, :size] / size - 0.5
    light, stripe = rng.uniform(0, 2 * np.pi, 2)
    shade = 1 + 0.25 * (x * np.cos(light) + y * np.sin(light))
    wave = 2 * np.pi * rng.uniform(6, 18) * (x * np.cos(stripe) + y * np.sin(stripe))
    shade = shade + rng.uniform(0, 0.14) * np.sin(wave) + 0.04 * _smooth_noise(rng, size, size // 4)
    surface = (color * shade[..., None]).clip(0, 1)
    image = image * (1 - 0.35 * shadow[..., None])
    return image + cover[..., None] * (surface - image)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """(size, size) noise of unit deviation before smoothing, that varies over `size / cells` pixels."""
    grid = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC), np.float64)


def _contrasting_color(rng: np.random.Generator, taken: list[np.ndarray]) -> np.ndarray:
    """The first vivid color that differs enough from those taken, else the most different one met."""
    best, best_distance = None, -1.0
    for _ in range(_TRIES):
        color = _rgb(rng.uniform(), rng.uniform(0.5, 0.95), rng.uniform(0.55, 1.0))
        distance = min(float(np.abs(color - other).mean()) for other in taken)
        if distance > best_distance:
            best, best_distance = color, distance
        if distance >= _MIN_CONTRAST:
            break
    return best


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """(3,) float64 in [0, 1]."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))
