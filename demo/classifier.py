"""Draw an image folder of shapes and textures; train a classifier on it, and validate both heads and the average."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from demo.drawing import IMAGE_CLASSES, draw_image
from demo.outcome import Outcome, markdown_table, new_folder, timed
from imagenet_overlock.checkpoints import LAST
from imagenet_overlock.recipe import load_recipe
from imagenet_overlock.train import train
from imagenet_overlock.validate import validate
from overlock.utils.errors import UserError


def run_demo(
    config: str | os.PathLike, work_dir: str | os.PathLike, options: Mapping[str, Any] | None = None
) -> Outcome:
    """Draw the images, train on them and validate.

    Args:
        config: Recipe with averaged weights.
        work_dir: Folder for `data/` and `run/`; those of an earlier demonstration are replaced.
        options: Settings over those of the recipe.

    Returns:
        The outcome, judged by the top-1 accuracy of the main head and the last weights.

    Raises:
        UserError: If `data/` or `run/` holds files that are of no demonstration.
    """
    recipe = load_recipe(config, options)
    run = new_folder(Path(work_dir, 'run'))
    files = {'checkpoint': run / LAST, 'figures of epochs': run / 'summary.csv', 'confusion': run / 'confusion.png'}
    seconds: dict[str, float] = {}
    with timed(seconds, 'drawing'):
        data = draw(Path(work_dir, 'data'))
    with timed(seconds, 'training'):
        train(recipe, data, run)
    with timed(seconds, 'validation'):
        check = partial(validate, data, checkpoint=str(run / LAST), aux=True, batch_size=50, workers=recipe.workers)
        weights = {'last': check().figures, 'averaged (EMA)': check(ema=True, confusion=files['confusion']).figures}
    rows = [['weights', 'top-1, main head', 'top-1, auxiliary head', 'top-5, main head', 'loss']]
    for name, figures in weights.items():
        accuracy = [f'{figures[head]:.1f}' for head in ('top1', 'aux_top1', 'top5')]
        rows.append([name, *accuracy, f'{figures["loss"]:.3f}'])
    chance = 100 / len(IMAGE_CLASSES)
    rows.append(['chance', f'{chance:.1f}', f'{chance:.1f}', f'{5 * chance:.1f}', ''])
    title = f'Accuracy on the {weights["last"]["images"]} validation images (%)'
    return Outcome(title, markdown_table(rows), 'top-1', weights['last']['top1'], 80, files, seconds)


def draw(root: str | os.PathLike, train: int = 200, val: int = 40, size: int = 96, seed: int = 0) -> Path:
    """Draw `train/` and `val/` with images of `size` pixels for each class; a folder drawn earlier is replaced.

    Raises:
        UserError: If a number is out of range, or `root` holds files that are of no demonstration.
    """
    if min(train, val) < 1 or size < 32:
        raise UserError(
            'The drawn image folder needs at least 1 image of each class in each split, and 32 pixels, got '
            f'train={train}, val={val}, size={size}.'
        )
    root = new_folder(root)
    for split, (name, count) in enumerate(dict(train=train, val=val).items()):
        for label, kind in enumerate(IMAGE_CLASSES):
            (root / name / kind).mkdir(parents=True)
            for index in range(count):
                # A generator for each image, so that it doesn't depend on how many there are.
                rng = np.random.default_rng((seed, split, label, index))
                draw_image(kind, size, rng).save(root / name / kind / f'{index:04d}.png')
    return root
