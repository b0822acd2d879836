"""The demonstration from the first drawn image to the report."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine_overlock.run import test, train
from overlock.utils.errors import UserError
from overlock.utils.files import drafted

from .pictures import draw_predictions
from .report import APTable, ap_table, plot_curves, read_scalars
from .shapes import draw, is_drawn

# What a run leaves beside the data, all of it cleared before the next one.
_RUN = 'run'
_FILES = {
    'checkpoint': 'checkpoint.pth',
    'AP table': 'ap.md',
    'loss and AP': 'curves.png',
    'predictions': 'predictions.png',
    'boxes': 'predictions.bbox.json',
    'masks': 'predictions.segm.json',
}


@dataclass(frozen=True)
class Outcome:
    """What a demonstration came to.

    Attributes:
        table: Average precision on the held-out images.
        files: What was left, by what it is.
        seconds: Time of each step.
    """

    table: APTable
    files: Mapping[str, Path]
    seconds: Mapping[str, float]

    @property
    def box_ap50(self) -> float:
        """Box AP50 over all classes, in [0, 1]."""
        return self.table.rows['all']['box']['AP50']


def run_demo(config: str | Path, work_dir: str | Path, cfg_options: dict[str, Any] | None = None) -> Outcome:
    """Draws the data, trains from random weights, evaluates the checkpoint on held-out images and reports.

    Args:
        config: Configuration of a detector with masks for the drawn shapes.
        work_dir: Folder for the data and all results; those of an earlier demonstration are replaced.
        cfg_options: Settings by dotted name, over those of the configuration.

    Returns:
        The outcome.

    Raises:
        UserError: If the folder holds files of the same names that are not of a demonstration.
    """
    work_dir = Path(work_dir).absolute()
    files = {what: work_dir / name for what, name in _FILES.items()}
    _clear(work_dir, [*files.values(), work_dir / _RUN])
    times = [time.monotonic()]

    data = draw(work_dir / 'data') / 'coco'
    times.append(time.monotonic())

    runner = train(config, work_dir=work_dir / _RUN, data_root=data, cfg_options=_options('train', cfg_options))
    os.replace(work_dir / _RUN / f'iter_{runner.max_iters}.pth', files['checkpoint'])
    (work_dir / _RUN / 'last_checkpoint').unlink()
    times.append(time.monotonic())

    options = {'test_evaluator.outfile_prefix': str(work_dir / 'predictions'), **_options('test', cfg_options)}
    test(config, str(files['checkpoint']), work_dir=work_dir / _RUN, data_root=data, cfg_options=options)
    times.append(time.monotonic())

    annotations = data / 'annotations' / 'instances_val2017.json'
    table = ap_table(annotations, {'box': files['boxes'], 'mask': files['masks']})
    with drafted(files['AP table']) as (path,):
        path.write_text(table.to_markdown())
    plot_curves(read_scalars(Path(runner.log_dir, 'vis_data', 'scalars.json')), files['loss and AP'])
    draw_predictions(annotations, data / 'val2017', files['masks'], files['predictions'])
    times.append(time.monotonic())

    steps = ('drawing', 'training', 'evaluation', 'report')
    return Outcome(table, files, {step: end - begin for step, begin, end in zip(steps, times, times[1:])})


def _options(step: str, cfg_options: dict[str, Any] | None) -> dict[str, Any]:
    """Adds a visualizer of its own: mmengine keeps them by name, and one kept writes into an earlier run's log."""
    return {**(cfg_options or {}), 'visualizer.name': f'{step}-{time.time_ns()}'}


def _clear(work_dir: Path, paths: list[Path]) -> None:
    """Removes the results of an earlier demonstration, and nothing that is not one's."""
    found = [path for path in paths if path.exists()]
    if found and not is_drawn(work_dir / 'data'):
        raise UserError(
            f'{found[0]} is there, but {work_dir} holds no earlier demonstration: name another folder with '
            '--work-dir DIR.'
        )
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
