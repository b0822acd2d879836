"""Draw scenes of shapes as a COCO data set; train a detector on them, evaluate it and report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from demo.drawing import SCENE_CLASSES, Scene, draw_scene
from demo.outcome import Outcome, new_folder, timed
from demo.report import ap_table, draw_predictions, plot_curves
from mmengine_overlock.run import test, train
from overlock.utils.errors import UserError


def run_demo(config: str | Path, work_dir: str | Path, cfg_options: dict[str, Any] | None = None) -> Outcome:
    """Draw the data, train from random weights, evaluate the checkpoint on held-out images and report.

    Args:
        config: Configuration of a detector with masks for the drawn shapes.
        work_dir: Folder for `data/` and `run/`; those of an earlier demonstration are replaced.
        cfg_options: Settings by dotted name, over those of the configuration.

    Returns:
        The outcome, judged by box AP50 over all classes.

    Raises:
        UserError: If `data/` or `run/` holds files that are of no demonstration.
    """
    run = new_folder(Path(work_dir, 'run'))
    files = {'curves': run / 'curves.png', 'predictions': run / 'predictions.png'}
    seconds: dict[str, float] = {}
    with timed(seconds, 'drawing'):
        data = draw(Path(work_dir, 'data')) / 'coco'
    with timed(seconds, 'training'):
        runner = train(config, work_dir=run, data_root=data, cfg_options=cfg_options)
        files['checkpoint'] = run / f'iter_{runner.max_iters}.pth'
    with timed(seconds, 'evaluation'):
        options = {**(cfg_options or {}), 'test_evaluator.outfile_prefix': str(run / 'predictions')}
        scores = test(config, str(files['checkpoint']), work_dir=run, data_root=data, cfg_options=options)
    with timed(seconds, 'report'):
        plot_curves(Path(runner.log_dir, 'vis_data', 'scalars.json'), files['curves'])
        annotations = data / 'annotations' / 'instances_val2017.json'
        draw_predictions(annotations, data / 'val2017', run / 'predictions.segm.json', files['predictions'])
    title, score = 'Average precision on the held-out images (%)', 100 * scores.get('coco/bbox_mAP_50', 0)
    return Outcome(title, ap_table(scores), 'box AP50', score, 50, files, seconds)


def draw(root: str | os.PathLike, train: int = 320, val: int = 48, size: int = 128, seed: int = 0) -> Path:
    """Draw `train` and `val` square images of `size` pixels; a folder drawn earlier is replaced.

    `coco/` below it has COCO's layout: `annotations/instances_{train,val}2017.json`, `train2017/`, `val2017/`; masks,
    boxes and areas are those of the visible parts.

    Raises:
        UserError: If a number is out of range, or `root` holds files that are of no demonstration.
    """
    if min(train, val) < len(SCENE_CLASSES) or size < 64:
        raise UserError(
            f'The drawn data set needs at least {len(SCENE_CLASSES)} images a split and a size of at least 64, '
            f'got train={train}, val={val}, size={size}; raise what is too low.'
        )
    root = new_folder(root)
    for index, (split, count) in enumerate(dict(train=train, val=val).items()):
        # A generator for each scene, so that it doesn't depend on how many there are.
        rngs = (np.random.default_rng((seed, index, number)) for number in range(count))
        scenes = (draw_scene(rng, size, number % len(SCENE_CLASSES)) for number, rng in enumerate(rngs))
        _write_split(root, split, scenes)
    return root


def _write_split(root: Path, split: str, scenes: Iterable[Scene]) -> None:
    """Write the images and the annotations of one split."""
    photos, coco = root / 'coco' / f'{split}2017', root / 'coco' / 'annotations'
    for folder in (photos, coco):
        folder.mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id, scene in enumerate(scenes, start=1):
        name = f'{image_id:06d}'
        Image.fromarray(scene.image).save(photos / f'{name}.jpg', quality=95, subsampling=0)
        height, width = scene.owner.shape
        images.append(dict(id=image_id, file_name=f'{name}.jpg', height=height, width=width))
        for annotation in _annotations(scene):
            annotations.append(dict(id=len(annotations) + 1, image_id=image_id, **annotation))
    categories = [dict(id=i, name=name, supercategory='shape') for i, name in enumerate(SCENE_CLASSES, start=1)]
    info = dict(description='Drawn geometric shapes')
    content = dict(info=info, licenses=[], images=images, categories=categories, annotations=annotations)
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
