"""Pictures of predictions next to the truth."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from pycocotools import mask as coco_mask

from .report import save_figure

_COLORS = ('#e6194b', '#3cb44b', '#4363d8', '#f58231', '#b13ad6', '#00a5a5', '#808000', '#9a6324')
_ENLARGED = 4


def draw_predictions(
    annotation_file: str | os.PathLike,
    image_folder: str | os.PathLike,
    result_file: str | os.PathLike,
    path: str | os.PathLike,
    count: int = 6,
    min_score: float = 0.5,
) -> None:
    """Draws the truth above and the predictions below, for the first images of a data set.

    Args:
        annotation_file: Ground truth in COCO format, masks as run-length codes.
        image_folder: Folder of its images.
        result_file: Predicted masks and boxes in COCO's result format.
        path: PNG to write.
        count: Number of images, from the first.
        min_score: Lowest score that is drawn.
    """
    truth = json.loads(Path(annotation_file).read_text())
    predictions = [p for p in json.loads(Path(result_file).read_text()) if p['score'] >= min_score]
    categories = {c['id']: (c['name'], _COLORS[i % len(_COLORS)]) for i, c in enumerate(truth['categories'])}
    images = truth['images'][:count]

    figure = Figure(figsize=(2.3 * len(images), 5.15), layout='constrained')
    grid = figure.subplots(2, len(images), squeeze=False)
    for column, image in enumerate(images):
        photo = Image.open(Path(image_folder, image['file_name'])).convert('RGB')
        for axes, objects in zip(grid[:, column], (truth['annotations'], predictions)):
            _draw_image(axes, photo)
            for item in sorted((o for o in objects if o['image_id'] == image['id']), key=lambda o: o.get('score', 1)):
                _draw_object(axes, item, *categories[item['category_id']])
    for axes, label in zip(grid[:, 0], ('truth', 'predicted')):
        axes.set_ylabel(label, fontsize=13)
    figure.legend(
        handles=[Patch(color=color, label=name) for name, color in categories.values()],
        loc='outside lower center',
        ncols=len(categories),
        frameon=False,
        fontsize=12,
    )
    save_figure(figure, path, dpi=130)


def _draw_image(axes: Axes, photo: Image.Image) -> None:
    width, height = photo.size
    large = photo.resize((width * _ENLARGED, height * _ENLARGED), Image.Resampling.BICUBIC)
    axes.imshow(np.asarray(large), extent=(0, width, height, 0))
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.spines[:].set_visible(False)


def _draw_object(axes: Axes, item: dict, name: str, color: str) -> None:
    """Fills the mask, draws its edge and box, and writes the score where there is one."""
    mask = coco_mask.decode(item['segmentation']).astype(np.float32)
    height, width = mask.shape
    large = np.asarray(Image.fromarray(mask).resize((width * _ENLARGED, height * _ENLARGED), Image.Resampling.BICUBIC))
    extent = dict(extent=(0, width, 0, height), origin='lower')
    axes.contourf(large, levels=(0.5, 2), colors=[color], alpha=0.45, **extent)
    axes.contour(large, levels=(0.5,), colors=[color], linewidths=1.6, **extent)
    x, y, box_width, box_height = item['bbox']
    axes.add_patch(Rectangle((x, y), box_width, box_height, fill=False, edgecolor='white', linewidth=1))
    # a label grows away from the nearer side, so that it stays inside the picture
    left = x + box_width / 2 < width / 2
    axes.text(
        max(x, 1) if left else min(x + box_width, width - 1),
        max(y - 1.5, 6),
        name if 'score' not in item else f'{name} {item["score"]:.2f}',
        horizontalalignment='left' if left else 'right',
        color='white',
        fontsize=8,
        path_effects=[patheffects.withStroke(linewidth=2.5, foreground=color)],
    ).set_in_layout(False)
