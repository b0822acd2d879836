"""Report on a detector: table of average precision, curves of loss and AP, pictures of predictions."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from demo.outcome import markdown_table
from overlock.utils.files import drafted

MEASURES = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')
_CURVES = {
    'box AP50': ('coco/bbox_mAP_50', 'tab:blue', '-'),
    'box AP': ('coco/bbox_mAP', 'tab:blue', '--'),
    'mask AP50': ('coco/segm_mAP_50', 'tab:orange', '-'),
    'mask AP': ('coco/segm_mAP', 'tab:orange', '--'),
}
_COLORS = ('#e6194b', '#3cb44b', '#4363d8', '#f58231', '#b13ad6', '#00a5a5', '#808000', '#9a6324')


def average_precision(annotation_file: Path, boxes: Path, masks: Path) -> dict[str, dict[str, np.ndarray]]:
    """Measure COCO's average precision of boxes and masks, for all classes together and for each.

    The files are in COCO's formats; `CocoMetric` writes predictions with `outfile_prefix`.

    Returns:
        The `MEASURES` of `rows[name][kind]` with name 'all' (first) or a class, kind 'box' or 'mask'; in [0, 1], and -1
        where the data set has no such object.
    """
    rows: dict[str, dict[str, np.ndarray]] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        classes = {category['name']: [category['id']] for category in truth.loadCats(truth.getCatIds())}
        for kind, iou_type, path in (('box', 'bbox', boxes), ('mask', 'segm', masks)):
            results = json.loads(path.read_text())
            if kind == 'mask':
                # COCO's API would take an object's size from its box where there is one.
                results = [{key: value for key, value in result.items() if key != 'bbox'} for result in results]
            evaluation = COCOeval(truth, truth.loadRes(results) if results else COCO(), iou_type)
            for name, ids in {'all': truth.getCatIds(), **classes}.items():
                evaluation.params.catIds = ids
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                rows.setdefault(name, {})[kind] = evaluation.stats[:6]
    return rows


def ap_table(rows: dict[str, dict[str, np.ndarray]]) -> str:
    """Return a Markdown table in percent, '-' for a size that doesn't occur."""
    table = [['class', *(f'{kind} {measure}' for kind in rows['all'] for measure in MEASURES)]]
    for name, row in rows.items():
        table.append([name, *('-' if value < 0 else f'{100 * value:.1f}' for value in np.concatenate([*row.values()]))])
    return markdown_table(table)


def plot_curves(log: Path, path: Path) -> None:
    """Plot loss and average precision over iterations, from the `scalars.json` of mmengine, into a PNG.

    Raises:
        ValueError: If nothing was logged.
    """
    records = [json.loads(line) for line in log.read_text().splitlines() if line.strip()]
    if not records:
        raise ValueError(f'expected logged values in {log}, found none: train first')
    figure = Figure(figsize=(11, 4), layout='constrained')
    loss_axes, ap_axes = figure.subplots(1, 2)
    steps, loss = _curve(records, 'loss')
    loss_axes.plot(steps, loss, color='tab:blue', alpha=0.3, label='logged')
    running = [loss[max(0, end - 5) : end].mean() for end in range(1, len(loss) + 1)]
    loss_axes.plot(steps, running, color='tab:blue', label='running mean')
    loss_axes.set(xlabel='iteration', ylabel='training loss', ylim=(0, None))
    for label, (key, color, style) in _CURVES.items():
        steps, values = _curve(records, key)
        if len(steps):
            ap_axes.plot(steps, 100 * values, style, color=color, marker='o', markersize=4, label=label)
    ap_axes.set(xlabel='iteration', ylabel='AP on held-out images (%)', ylim=(0, 100))
    for axes in (loss_axes, ap_axes):
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False)
    _save(figure, path, 110)


def _curve(records: Sequence[Mapping], key: str) -> np.ndarray:
    """Return the steps and the values of a logged name, (2, N)."""
    return np.array([(record['step'], record[key]) for record in records if key in record], float).reshape(-1, 2).T


def draw_predictions(
    annotation_file: Path, image_folder: Path, result_file: Path, path: Path, count: int = 6, min_score: float = 0.5
) -> None:
    """Draw the truth above and the predictions from `min_score` on below, for the first images, into a PNG."""
    truth = json.loads(annotation_file.read_text())
    predictions = [p for p in json.loads(result_file.read_text()) if p['score'] >= min_score]
    categories = {c['id']: (c['name'], _COLORS[i % len(_COLORS)]) for i, c in enumerate(truth['categories'])}
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
    _save(figure, path, 130)


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


def _save(figure: Figure, path: Path, dpi: int) -> None:
    with drafted(path) as (new,):
        figure.savefig(new, format='png', dpi=dpi)
