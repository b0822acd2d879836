"""Report on a detector: table of average precision, curves of loss and AP, pictures of predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from pycocotools import mask as coco_mask

from demo.outcome import markdown_table

# Of the classes in their order.
_COLORS = ('#e6194b', '#3cb44b', '#4363d8', '#f58231', '#b13ad6')


def ap_table(scores: Mapping[str, float]) -> str:
    """Return the scores of `CocoMetric` as a Markdown table in percent, '-' for a size that doesn't occur."""
    rows = [['', 'AP', 'AP50', 'AP75', 'APs', 'APm', 'APl']]
    for name, kind in (('boxes', 'bbox'), ('masks', 'segm')):
        # Without a single prediction there are no scores.
        values = [scores.get(f'coco/{kind}_mAP{suffix}', 0) for suffix in ('', '_50', '_75', '_s', '_m', '_l')]
        rows.append([name, *('-' if value < 0 else f'{100 * value:.1f}' for value in values)])
    return markdown_table(rows)


def plot_curves(log: Path, path: Path) -> None:
    """Plot loss and average precision over iterations, from the `scalars.json` of mmengine, into a PNG."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(11, 4), layout='constrained')
    for axes, names in zip(figure.subplots(1, 2), (['loss'], ['coco/bbox_mAP_50', 'coco/segm_mAP_50']), strict=True):
        for name in names:
            points = [(record['step'], record[name]) for record in records if name in record]
            axes.plot(*zip(*points, strict=True), marker='.', label=name)
        axes.set(xlabel='iteration', ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw_predictions(
    annotation_file: Path, image_folder: Path, result_file: Path, path: Path, count: int = 6, min_score: float = 0.5
) -> None:
    """Draw the truth above and the predictions from `min_score` on below, for the first images, into a PNG."""
    truth = json.loads(annotation_file.read_text())
    predictions = [p for p in json.loads(result_file.read_text()) if p['score'] >= min_score]
    categories = {c['id']: (c['name'], color) for c, color in zip(truth['categories'], _COLORS, strict=True)}
    images = truth['images'][:count]

    figure = Figure(figsize=(2.3 * len(images), 5.15), layout='constrained')
    grid = figure.subplots(2, len(images), squeeze=False)
    for column, image in enumerate(images):
        photo = Image.open(image_folder / image['file_name']).convert('RGB')
        for axes, objects in zip(grid[:, column], (truth['annotations'], predictions), strict=True):
            width, height = photo.size
            axes.imshow(photo, extent=(0, width, height, 0), interpolation='bicubic')
            axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
            axes.spines[:].set_visible(False)
            for item in sorted((o for o in objects if o['image_id'] == image['id']), key=lambda o: o.get('score', 1)):
                _draw_object(axes, item, *categories[item['category_id']])
    for axes, label in zip(grid[:, 0], ('truth', 'predicted'), strict=True):
        axes.set_ylabel(label, fontsize=13)
    handles = [Patch(color=color, label=name) for name, color in categories.values()]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(handles), frameon=False, fontsize=12)
    figure.savefig(path, dpi=130)


def _draw_object(axes: Axes, item: dict, name: str, color: str) -> None:
    """Fill the mask, draw its edge and box, and write the score where there is one."""
    mask = coco_mask.decode(item['segmentation']).astype(np.float32)
    height, width = mask.shape
    extent = (0, width, 0, height)
    axes.contourf(mask, levels=(0.5, 2), colors=[color], alpha=0.45, extent=extent, origin='lower')
    axes.contour(mask, levels=(0.5,), colors=[color], linewidths=1.6, extent=extent, origin='lower')
    x, y, box_width, box_height = item['bbox']
    axes.add_patch(Rectangle((x, y), box_width, box_height, fill=False, edgecolor='white', linewidth=1))
    # A label grows away from the nearer side, so that it stays inside the picture.
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
