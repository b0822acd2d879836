"""Draw predictions, with names in any language.

mmdet's and mmseg's visualizers draw by matplotlib, at the full size several times: 23 s for a picture of 12 megapixels
with 15 objects.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

# The part of a mask or label map that is color.
_ALPHA = 0.5
# Letters and lines, in the shorter side of the picture.
_LETTER, _LINE = 1 / 35, 1 / 300
# Of the legend, in heights of its letters.
_ROW, _GAP = 1.7, 0.5

Color = tuple[int, int, int]


class Drawing:
    """Draws predictions: boxes with classes and scores, masks, label maps with a legend.

    Args:
        classes: Names of the classes. Those with letters that no font of this machine has are drawn as numbers.
        palette: Their colors, as red, green and blue; None for colors of any kind.

    Attributes:
        note: What to tell of names that cannot be drawn, or ''.
    """

    def __init__(self, classes: Sequence[str], palette: Sequence[Sequence[int]] | None) -> None:
        if palette is None or len(palette) != len(classes):
            palette = np.random.default_rng(0).integers(0, 256, (len(classes), 3)).tolist()
        self._colors: list[Color] = [(blue, green, red) for red, green, blue in palette]
        odd = [name for name in classes if find_font(name) is None]
        self._names = [f'class {label}' if name in odd else name for label, name in enumerate(classes)]
        self.note = ''
        if odd:
            self.note = (
                f'no font of this machine has the letters of {", ".join(odd[:5])}{" ..." * (len(odd) > 5)}: pictures '
                'name these classes by their numbers; install a font such as Noto Sans CJK'
            )

    def __call__(self, pixels: np.ndarray, sample: Any, rows: int | None = None) -> np.ndarray:
        """Draw a data sample of mmdet or mmseg on an image.

        Args:
            pixels: (H, W, 3), uint8, in the order blue, green, red.
            sample: What was found in it.
            rows: Of the legend, which lists the largest classes first; as many as it needs by default.

        Returns:
            The same kind; with a legend it is higher.
        """
        if 'pred_instances' in sample:
            return self._draw_objects(pixels.copy(), sample.pred_instances)
        return self._draw_labels(pixels, sample.pred_sem_seg.data[0].cpu().numpy().astype(int), rows)

    def _draw_objects(self, canvas: np.ndarray, found: Any) -> np.ndarray:
        line = max(2, round(min(canvas.shape[:2]) * _LINE))
        # The surest one comes last, above the others.
        order = found.scores.argsort().tolist()
        for index in order if 'masks' in found else ():
            mask, color = found.masks[index].numpy(), self._color(int(found.labels[index]))
            canvas[mask] = (canvas[mask] * (1 - _ALPHA) + np.array(color) * _ALPHA).astype(np.uint8)
            contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
            cv2.drawContours(canvas, contours, -1, color, line)
        texts = []
        for index in order:
            x1, y1, x2, y2 = (round(side) for side in found.bboxes[index].tolist())
            label = int(found.labels[index])
            cv2.rectangle(canvas, (x1, y1), (x2, y2), self._color(label), line)
            texts.append((x1, y1, label, f'{self._name(label)} {found.scores[index]:.2f}'))
        image = Image.fromarray(canvas)
        draw, size = ImageDraw.Draw(image), _letters(canvas)
        for x1, y1, label, text in texts:
            font, color = _font(self._name(label), size), self._color(label)
            # Above the box, or at the border of the picture.
            x = max(0, min(x1, canvas.shape[1] - round(font.getlength(text)) - 4))
            y = max(0, y1 - round(1.3 * size))
            draw.rectangle((x, y, x + font.getlength(text) + 4, y + 1.3 * size), fill=color)
            draw.text((x + 2, y + 0.65 * size), text, fill=_readable_on(color), font=font, anchor='lm')
        return np.array(image)

    def _draw_labels(self, pixels: np.ndarray, labels: np.ndarray, rows: int | None) -> np.ndarray:
        # What is no class, as 255, stays as it is.
        present, counts = np.unique(labels[labels < len(self._names)], return_counts=True)
        canvas = pixels.copy()
        for label in present:
            canvas[labels == label] = self._color(label)
        blended = cv2.addWeighted(pixels, 1 - _ALPHA, canvas, _ALPHA, 0)
        legend = self._legend(present[np.argsort(-counts)].tolist(), _letters(pixels), pixels.shape[1], rows)
        return np.concatenate([blended, legend])

    def _legend(self, labels: Sequence[int], size: int, width: int, rows: int | None) -> np.ndarray:
        """Draw colors and names of classes below each other and side by side: (height, width, 3)."""
        gap, row = round(_GAP * size), round(_ROW * size)
        places, x, y = [], gap, gap
        for label in labels:
            length = size + gap + round(_font(self._names[label], size).getlength(self._names[label]))
            if x > gap and x + length > width:
                x, y = gap, y + row
            places.append((x, y))
            x += length + 2 * gap
        image = Image.new('RGB', (width, y + row if rows is None else gap + rows * row), 'white')
        draw = ImageDraw.Draw(image)
        for label, (x, y) in zip(labels, places, strict=True):
            draw.rectangle((x, y, x + size, y + size), fill=self._color(label), outline='black')
            name = self._names[label]
            draw.text((x + size + gap, y + size / 2), name, fill='black', font=_font(name, size), anchor='lm')
        return np.array(image)

    def _name(self, label: int) -> str:
        return self._names[label] if label < len(self._names) else f'class {label}'

    def _color(self, label: int) -> Color:
        return self._colors[label] if label < len(self._colors) else (0, 0, 255)


@functools.cache
def find_font(text: str) -> str | None:
    """Return the file of a font that has all letters of a text, DejaVu Sans where it can; None if there is none."""
    # The last resort has a box for each letter.
    fonts = [font for font in font_manager.fontManager.ttflist if not font.name.startswith('Last Resort')]
    plain = [font for font in fonts if font.style == 'normal']
    for font in sorted(
        plain, key=lambda font: (font.name != 'DejaVu Sans', font.weight not in (400, 'normal'), font.name)
    ):
        if {ord(letter) for letter in text if not letter.isspace()} <= _letters_of(font.fname):
            return str(font.fname)
    return None


@functools.cache
def _letters_of(file: str) -> frozenset[int]:
    return frozenset(FT2Font(file).get_charmap())


@functools.lru_cache(10000)
def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(find_font(text) or font_manager.findfont('DejaVu Sans'), size)


def _letters(pixels: np.ndarray) -> int:
    return max(12, round(min(pixels.shape[:2]) * _LETTER))


def _readable_on(color: Color) -> str:
    blue, green, red = color
    return 'black' if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else 'white'
