"""The demonstration: drawn images, training from random weights, validation of both heads and of the average."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagenet_overlock.checkpoints import LAST
from imagenet_overlock.drawn import CLASSES, draw, is_drawn
from imagenet_overlock.recipe import load_recipe
from imagenet_overlock.train import train
from imagenet_overlock.validate import Validation, validate
from overlock.utils.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """What a demonstration came to.

    Attributes:
        last: Figures of the last weights.
        average: Figures of their average over the updates.
        files: What was left, by what it is.
        seconds: Time of each step.
    """

    last: Validation
    average: Validation
    files: Mapping[str, Path]
    seconds: Mapping[str, float]

    def to_markdown(self) -> str:
        """The figures as a table."""
        lines = [
            '| weights | top-1, main head | top-1, auxiliary head | top-5, main head | loss |',
            '| --- | --- | --- | --- | --- |',
        ]
        for name, found in (('last', self.last), ('averaged (EMA)', self.average)):
            metrics = found.metrics
            lines.append(
                f'| {name} | {metrics.top1:.1f} | {metrics.aux_top1:.1f} | {metrics.top5:.1f} | {metrics.loss:.3f} |'
            )
        lines.append(f'| chance | {100 / len(CLASSES):.1f} | {100 / len(CLASSES):.1f} | {500 / len(CLASSES):.1f} | |')
        return '\n'.join(lines)


def run_demo(
    config: str | os.PathLike, work_dir: str | os.PathLike, options: Mapping[str, Any] | None = None
) -> Outcome:
    """Draws the images, trains on them and validates.

    Args:
        config: Recipe with averaged weights.
        work_dir: Folder for the images and all results; those of an earlier demonstration are replaced.
        options: Settings over those of the recipe.

    Raises:
        UserError: If the folder holds a run that is not of a demonstration.
    """
    recipe = load_recipe(config, options)
    work_dir = Path(work_dir)
    run, times = work_dir / 'run', [time.monotonic()]
    if run.exists():
        if not is_drawn(work_dir / 'data'):
            raise UserError(
                f'{run} is there, but {work_dir} holds no earlier demonstration: name another folder with '
                '--work-dir DIR.'
            )
        shutil.rmtree(run)
    data = draw(work_dir / 'data')
    times.append(time.monotonic())
    train(recipe, data, run)
    times.append(time.monotonic())
    files = {'checkpoint': run / LAST, 'figures of epochs': run / 'summary.csv', 'confusion': run / 'confusion.png'}
    last, average = (
        validate(
            data,
            checkpoint=str(run / LAST),
            ema=ema,
            aux=True,
            batch_size=50,
            workers=recipe.workers,
            confusion=files['confusion'] if ema else None,
        )
        for ema in (False, True)
    )
    times.append(time.monotonic())
    steps = ('drawing', 'training', 'validation')
    return Outcome(
        last, average, files, {step: end - begin for step, begin, end in zip(steps, times, times[1:], strict=False)}
    )
