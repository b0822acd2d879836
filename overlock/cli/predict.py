"""Predict images, folders, patterns and videos with a trained or exported detector or segmenter."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlock.utils.configs import find_config

if TYPE_CHECKING:
    from mmengine_overlock.predict import Picture


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option('inputs', nargs='+', metavar='INPUT', help='image, folder, pattern or video')
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        '--checkpoint', dest='model', metavar='FILE', help='the weights: a path, a URL, or a published name'
    )
    source.add_argument('--model', metavar='FILE.onnx', help='a detector or segmenter that `overlock export` wrote')
    option('--config', metavar='NAME', help='name or path of the configuration (default: the one in the checkpoint)')
    option('--out', required=True, metavar='DIR', help='folder for results and pictures')
    option('--score', type=float, default=0.3, metavar='X', help='least score of a box (default: 0.3)')
    tiles = 'predict images larger than this in tiles of so many pixels a side (default: whole images)'
    option('--tile', type=int, metavar='SIZE', help=tiles)
    option('--device', metavar='NAME', help='cuda or cpu (default: cuda where there is a GPU)')
    option('--batch', type=int, default=1, metavar='N', help='images or tiles of a step (default: 1)')
    option('--no-pictures', dest='draw', action='store_false', help='draw nothing')


def run(inputs: list[str], model: str, config: str | None, out: str, draw: bool, **options: Any) -> int:
    config = str(find_config(config)) if config else None
    from tqdm import tqdm

    from mmengine_overlock.predict import Pictures, Predictor
    from mmengine_overlock.predict.answers import Answers

    pictures = Pictures(inputs)
    predictor = Predictor(model, config, **options)
    # Where nobody watches, a line now and then.
    interval = 0.1 if sys.stderr.isatty() else 30
    stopped = False
    with Answers(out, predictor, pictures.root, draw) as answers:
        bar = tqdm(predictor.predict(pictures), total=len(pictures), unit='image', mininterval=interval)
        try:
            for picture, sample in bar:
                answers.add(picture, sample)
        except KeyboardInterrupt:
            bar.close()
            stopped = True
    objects = f', {len(answers.results)} objects of score {predictor.score:g} or more' * (predictor.scope == 'mmdet')
    print(f'{"stopped: " * stopped}{answers.images} images predicted{objects}, results in {out}')
    if answers.drawing and answers.drawing.note:
        print(answers.drawing.note)
    if pictures.unreadable:
        print('not readable:', *(f'{file}: {why}' for file, why in pictures.unreadable.items()), sep='\n  ')
    return 130 if stopped else int(bool(pictures.unreadable))


def predict(
    inputs: str | Path | Sequence[str | Path],
    model: str | Path,
    *,
    config: str | Path | None = None,
    score: float = 0.3,
    tile: int | None = None,
    batch: int = 1,
    device: str | None = None,
) -> Iterator[tuple[Picture, Any]]:
    """Predict images and videos with a trained or exported detector or segmenter.

    ```
    for picture, answer in overlock.predict('photos/', 'epoch_36.pth'):
        detections = supervision.Detections.from_mmdetection(answer)
    ```

    Args:
        inputs: Images, videos, folders with all that is below them, and patterns.
        model: A checkpoint, by path, URL or published name, or an exported file that ends in `.onnx`.
        config: The configuration of a checkpoint, by name or path; by default the one that it carries.
        score: Boxes below it are left out.
        tile: Sides (in pixels) of the tiles that larger images are predicted in; None for whole images.
        batch: Images or tiles of a step.
        device: Such as 'cuda:0' or 'cpu'; by default a GPU where there is one.

    Returns:
        Yields each image as it is read, with `source` (its file), `pixels` ((H, W, 3), uint8, in the order blue, green,
        red) and `frame` (of a video, from 0), beside the data sample of mmdet or mmseg. A detector's has
        `pred_instances`, on the CPU: bboxes (N, 4), float32, x1, y1, x2, y2 in pixels; scores (N,), float32; labels
        (N,), int64; with a mask head masks (N, H, W), bool. A segmenter's has `pred_sem_seg.data` (1, H, W), int64, and
        `seg_logits`.
        A warning at the end names files that could not be read.

    Raises:
        UserError, CheckpointError: What was given cannot be used; one sentence says why.
    """
    from mmengine_overlock.predict import Pictures, Predictor

    pictures = Pictures([inputs] if isinstance(inputs, (str, Path)) else inputs)
    predictor = Predictor(model, config, device, score=score, tile=tile, batch=batch)

    def answers() -> Iterator[tuple[Picture, Any]]:
        yield from predictor.predict(pictures)
        if pictures.unreadable:
            named = ', '.join(f'{file} {why}' for file, why in pictures.unreadable.items())
            warnings.warn(f'Files that could not be read: {named}.', stacklevel=2)

    return answers()
