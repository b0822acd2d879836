"""Draw scenes of shapes as a COCO and as an ADE20K data set; train a detector on them, evaluate it and report."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from demo.drawing import SCENE_CLASSES, Scene, draw_scene
from demo.outcome import Outcome, clear_results, draw_once, timed
from demo.report import MEASURES, ap_table, average_precision, draw_predictions, plot_curves
from mmengine_overlock.run import test, train
from overlock.utils.errors import UserError
from overlock.utils.files import drafted

_ADE_FOLDERS = {'train': 'training', 'val': 'validation'}
# A run leaves these files and its logs beside the data; the next one replaces them.
_LOGS = 'run'
_FILES = {
    'checkpoint': 'checkpoint.pth',
    'AP table': 'ap.md',
    'loss and AP': 'curves.png',
    'predictions': 'predictions.png',
    'boxes': 'predictions.bbox.json',
    'masks': 'predictions.segm.json',
}


def run_demo(config: str | Path, work_dir: str | Path, cfg_options: dict[str, Any] | None = None) -> Outcome:
    """Draw the data, train from random weights, evaluate the checkpoint on held-out images and report.

    Args:
        config: Configuration of a detector with masks for the drawn shapes.
        work_dir: Folder for the data and all results; those of an earlier demonstration are replaced.
        cfg_options: Settings by dotted name, over those of the configuration.

    Returns:
        The outcome, judged by box AP50 over all classes, in [0, 1].

    Raises:
        UserError: If the folder holds files of the same names that are not of a demonstration.
    """
    work_dir = Path(work_dir).absolute()
    logs, files = work_dir / _LOGS, {what: work_dir / name for what, name in _FILES.items()}
    clear_results(work_dir, [*files.values(), logs])
    seconds: dict[str, float] = {}
    with timed(seconds, 'drawing'):
        data = draw(work_dir / 'data') / 'coco'
    with timed(seconds, 'training'):
        runner = train(config, work_dir=logs, data_root=data, cfg_options=_options('train', cfg_options))
        os.replace(logs / f'iter_{runner.max_iters}.pth', files['checkpoint'])
        (logs / 'last_checkpoint').unlink()
    with timed(seconds, 'evaluation'):
        options = {'test_evaluator.outfile_prefix': str(work_dir / 'predictions'), **_options('test', cfg_options)}
        test(config, str(files['checkpoint']), work_dir=logs, data_root=data, cfg_options=options)
    with timed(seconds, 'report'):
        annotations = data / 'annotations' / 'instances_val2017.json'
        rows = average_precision(annotations, files['boxes'], files['masks'])
        with drafted(files['AP table']) as (path,):
            path.write_text(ap_table(rows))
        plot_curves(Path(runner.log_dir, 'vis_data', 'scalars.json'), files['loss and AP'])
        draw_predictions(annotations, data / 'val2017', files['masks'], files['predictions'])
    return Outcome(
        'Average precision on the held-out images (%)',
        ap_table(rows),
        float(rows['all']['box'][MEASURES.index('AP50')]),
        files,
        seconds,
    )


def _options(step: str, cfg_options: dict[str, Any] | None) -> dict[str, Any]:
    """Name the visualizer uniquely: mmengine reuses one of the same name, which writes to an earlier run's log."""
    return {**(cfg_options or {}), 'visualizer.name': f'{step}-{time.time_ns()}'}


def draw(root: str | os.PathLike, train: int = 320, val: int = 48, size: int = 128, seed: int = 0) -> Path:
    """Draw `train` and `val` square images of `size` pixels, unless both splits are complete already.

    The same scenes are written twice: `coco/` (`annotations/instances_{train,val}2017.json`, `train2017/`,
    `val2017/`; masks, boxes and areas of the visible parts) and `ade/` (`images/{training,validation}/`,
    `annotations/{training,validation}/`; 0 is background, c + 1 is `SCENE_CLASSES[c]`).

    Raises:
        UserError: If a number is out of range, or `root` holds something else than a drawn data set.
    """
    if min(train, val) < len(SCENE_CLASSES) or size < 64:
        raise UserError(
            f'The drawn data set needs at least {len(SCENE_CLASSES)} images a split and a size of at least 64, '
            f'got train={train}, val={val}, size={size}; raise what is too low.'
        )

    def write(folder: Path) -> None:
        for index, (split, count) in enumerate(dict(train=train, val=val).items()):
            # A generator for each scene, so that it doesn't depend on how many there are.
            rngs = (np.random.default_rng((seed, index, number)) for number in range(count))
            scenes = (draw_scene(rng, size, number % len(SCENE_CLASSES)) for number, rng in enumerate(rngs))
            _write_split(folder, split, scenes)

    return draw_once(root, write, train=train, val=val, size=size, seed=seed)


def _write_split(root: Path, split: str, scenes: Iterator[Scene]) -> None:
    """Write one split in both formats."""
    photos, coco = root / 'coco' / f'{split}2017', root / 'coco' / 'annotations'
    ade_photos, ade_maps = (root / 'ade' / kind / _ADE_FOLDERS[split] for kind in ('images', 'annotations'))
    for folder in (photos, coco, ade_photos, ade_maps):
        folder.mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id, scene in enumerate(scenes, start=1):
        name = f'{image_id:06d}'
        Image.fromarray(scene.image).save(photos / f'{name}.jpg', quality=95, subsampling=0)
        shutil.copyfile(photos / f'{name}.jpg', ade_photos / f'{name}.jpg')
        Image.fromarray(scene.semantic_map()).save(ade_maps / f'{name}.png')
        height, width = scene.owner.shape
        images.append(dict(id=image_id, file_name=f'{name}.jpg', height=height, width=width))
        for annotation in _annotations(scene):
            annotations.append(dict(id=len(annotations) + 1, image_id=image_id, **annotation))
    categories = [dict(id=i, name=name, supercategory='shape') for i, name in enumerate(SCENE_CLASSES, start=1)]
    content = dict(
        info=dict(description='Drawn geometric shapes'),
        licenses=[],
        images=images,
        categories=categories,
        annotations=annotations,
    )
    (coco / f'instances_{split}2017.json').write_text(json.dumps(content, sort_keys=True) + '\n')


def _annotations(scene: Scene) -> Iterator[dict]:
    """Yield COCO annotations of a scene's visible shapes, without their ids."""
    for index, label in enumerate(scene.labels, start=1):
        mask = scene.owner == index
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        yield dict(
            category_id=label + 1,
            segmentation=dict(size=rle['size'], counts=rle['counts'].decode('ascii')),
            bbox=coco_mask.toBbox(rle).tolist(),
            area=int(mask.sum()),
            iscrowd=0,
        )
