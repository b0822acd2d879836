"""Detect objects in tiles of a large image, and merge what was found, by sahi."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.structures import InstanceData

# sahi's own settings. Of the side of a tile.
OVERLAP = 0.2
# Boxes of a class that share this much of the smaller one are one object.
_SHARED = 0.5
# Below this score there are boxes everywhere, whose unions would grow: the better one stays as it is.
_LOW_SCORE = 0.1

Place = Sequence[int]


def places(height: int, width: int, tile: int) -> list[Place]:
    """Return the tiles of an image as x1, y1, x2, y2 in pixels, and behind them the whole image."""
    from sahi.slicing import get_slice_bboxes

    tiles: list[Place] = [*get_slice_bboxes(height, width, tile, tile, False, OVERLAP, OVERLAP)]
    return [*tiles, (0, 0, width, height)]


def merge(tiles: Sequence[Place], samples: Sequence[Any], score: float) -> Any:
    """Merge the detections in tiles into those of the image.

    Boxes of one object become the smallest box around them, and its masks their union; the highest score counts.

    Args:
        tiles: The tiles as by `places`.
        samples: mmdet's data samples of the tiles.
        score: Boxes below it are left out before.

    Returns:
        The last sample, with all objects.
    """
    from sahi.postprocess.combine import batched_greedy_nmm, batched_nms

    _, _, width, height = tiles[-1]
    parts = [sample.pred_instances[sample.pred_instances.scores >= score].cpu() for sample in samples]
    origins = [torch.tensor([x1, y1, x1, y1]) for x1, y1, _, _ in tiles]
    boxes = torch.cat([part.bboxes + origin for part, origin in zip(parts, origins, strict=True)])
    scores, labels = (torch.cat([part[name] for part in parts]) for name in ('scores', 'labels'))
    table = torch.cat([boxes, scores[:, None], labels[:, None]], 1).numpy()
    groups: dict[int, list[int]] = {}
    if len(table) and score < _LOW_SCORE:
        groups = {int(kept): [] for kept in batched_nms(table, 'IOU', _SHARED)}
    elif len(table):
        groups = batched_greedy_nmm(table, 'IOS', _SHARED)
    objects = sorted(([kept, *others] for kept, others in groups.items()), key=lambda group: -scores[group].max())
    first = [group[0] for group in objects]
    found = InstanceData(
        bboxes=_stack([torch.cat([boxes[g, :2].amin(0), boxes[g, 2:].amax(0)]) for g in objects], boxes[:0]),
        scores=_stack([scores[group].max() for group in objects], scores[:0]),
        labels=labels[first],
    )
    if 'masks' in parts[-1]:
        masks = [(tile, mask) for tile, part in zip(tiles, parts, strict=True) for mask in part.masks]
        whole = np.zeros((len(objects), height, width), bool)
        for union, group in zip(whole, objects, strict=True):
            for (x1, y1, x2, y2), mask in (masks[index] for index in group):
                union[y1:y2, x1:x2] |= mask.numpy()
        found.masks = torch.from_numpy(whole)
    samples[-1].pred_instances = found
    return samples[-1]


def _stack(rows: list[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    return torch.stack(rows) if rows else empty
