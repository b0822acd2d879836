"""What a finished run shows: the AP table and the curves of loss and AP, from the files that the run left."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from overlock.utils.files import drafted

MEASURES = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')
_IOU_TYPES = {'box': 'bbox', 'mask': 'segm'}
_CURVES = {
    'box AP50': ('coco/bbox_mAP_50', 'tab:blue', '-'),
    'box AP': ('coco/bbox_mAP', 'tab:blue', '--'),
    'mask AP50': ('coco/segm_mAP_50', 'tab:orange', '-'),
    'mask AP': ('coco/segm_mAP', 'tab:orange', '--'),
}


@dataclass(frozen=True)
class APTable:
    """Average precision of all classes together and of each.

    Attributes:
        rows: `rows[name][kind][measure]` with name 'all' or a class, kind 'box' or 'mask', measure one of `MEASURES`;
            in [0, 1], NaN where the data set has no such object.
    """

    rows: Mapping[str, Mapping[str, Mapping[str, float]]]

    def to_markdown(self) -> str:
        """The table in percent, '-' for a size that doesn't occur."""
        kinds = list(next(iter(self.rows.values())))
        header = ['class', *(f'{kind} {measure}' for kind in kinds for measure in MEASURES)]
        lines = [header, ['---', *['---:'] * (len(header) - 1)]]
        for name, row in self.rows.items():
            values = [row[kind][measure] for kind in kinds for measure in MEASURES]
            lines.append([name, *('-' if np.isnan(value) else f'{100 * value:.1f}' for value in values)])
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        aligned = ([cell.ljust(width) for cell, width in zip(line, widths)] for line in lines)
        return ''.join(f'| {" | ".join(line)} |\n' for line in aligned)


def ap_table(annotation_file: str | os.PathLike, result_files: Mapping[str, str | os.PathLike]) -> APTable:
    """Measures COCO's average precision, for all classes together and for each.

    Args:
        annotation_file: Ground truth in COCO format.
        result_files: Predictions in COCO's result format under 'box', 'mask' or both (`CocoMetric` writes them with
            `outfile_prefix`).

    Returns:
        The table, 'all' in its first row.

    Raises:
        ValueError: If a key of `result_files` is unknown.
    """
    unknown = set(result_files) - set(_IOU_TYPES)
    if unknown:
        raise ValueError(f'result_files must have the keys {", ".join(_IOU_TYPES)}, got {", ".join(sorted(unknown))}')
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        names = [category['name'] for category in truth.loadCats(truth.getCatIds())]
        columns = {kind: _precision(truth, path, _IOU_TYPES[kind]) for kind, path in result_files.items()}
    rows = {'all': {kind: _measures(precision) for kind, precision in columns.items()}}
    for index, name in enumerate(names):
        rows[name] = {kind: _measures(precision[:, :, [index]]) for kind, precision in columns.items()}
    return APTable(rows)


def _precision(truth: COCO, result_file: str | os.PathLike, iou_type: str) -> np.ndarray:
    """COCOeval's precision at 100 detections: (10 thresholds, 101 recalls, classes, 4 size ranges); -1 is no object."""
    results = json.loads(Path(result_file).read_text())
    if iou_type == 'segm':
        # COCO's API would take an object's size from its box where there is one
        results = [{key: value for key, value in result.items() if key != 'bbox'} for result in results]
    predictions = truth.loadRes(results) if results else COCO()
    evaluation = COCOeval(truth, predictions, iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval['precision'][..., -1]


def _measures(precision: np.ndarray) -> dict[str, float]:
    """COCO's six numbers of one precision array."""
    parts = (precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *np.moveaxis(precision, -1, 0)[1:])
    known = (part[part > -1] for part in parts)
    return {name: float(part.mean()) if part.size else float('nan') for name, part in zip(MEASURES, known)}


def read_scalars(path: str | os.PathLike) -> list[dict]:
    """Reads the `scalars.json` of mmengine's `LocalVisBackend`: one JSON object a line.

    Raises:
        ValueError: If nothing was logged.
    """
    records = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    if not records:
        raise ValueError(f'expected logged values in {path}, found none: train first')
    return records


def plot_curves(records: Sequence[Mapping], path: str | os.PathLike, title: str = '') -> None:
    """Plots the loss, and the average precision on the held-out images, over iterations.

    Args:
        records: Logged values as `read_scalars` gives them.
        path: PNG to write.
        title: Heading of the figure.
    """
    figure = Figure(figsize=(11, 4), layout='constrained')
    figure.suptitle(title)
    loss_axes, ap_axes = figure.subplots(1, 2)
    loss = np.array([(r['step'], r['loss']) for r in records if 'loss' in r], float).reshape(-1, 2)
    loss_axes.plot(*loss.T, color='tab:blue', alpha=0.3, label='logged')
    loss_axes.plot(loss[:, 0], _running_mean(loss[:, 1]), color='tab:blue', label='running mean')
    loss_axes.set(xlabel='iteration', ylabel='training loss', ylim=(0, None))
    for label, (key, color, style) in _CURVES.items():
        points = np.array([(r['step'], r[key]) for r in records if key in r], float).reshape(-1, 2)
        if len(points):
            ap_axes.plot(points[:, 0], 100 * points[:, 1], style, color=color, marker='o', markersize=4, label=label)
    ap_axes.set(xlabel='iteration', ylabel='AP on held-out images (%)', ylim=(0, 100))
    for axes in (loss_axes, ap_axes):
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False)
    save_figure(figure, path)


def _running_mean(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Mean of every value with up to `width` - 1 before it."""
    return np.array([values[max(0, end - width) : end].mean() for end in range(1, len(values) + 1)])


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int = 110) -> None:
    """Writes a PNG whole or not at all."""
    with drafted(Path(path)) as (new,):
        figure.savefig(new, format='png', dpi=dpi)
