"""Predict images, folders, patterns and videos with a trained detector or segmenter."""

from __future__ import annotations

import argparse

from overlock.utils.configs import find_config


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option('inputs', nargs='+', metavar='INPUT', help='image, folder, pattern or video')
    option('--checkpoint', required=True, metavar='FILE', help='the weights: a path, a URL, or a published name')
    option('--config', metavar='NAME', help='name or path of the configuration (default: the one in the checkpoint)')
    option('--out', required=True, metavar='DIR', help='folder for results and pictures')
    option('--score', type=float, default=0.3, metavar='X', help='least score of a box (default: 0.3)')
    option('--device', metavar='NAME', help='cuda or cpu (default: cuda where there is a GPU)')
    option('--batch', type=int, default=1, metavar='N', help='images of a step (default: 1)')
    option('--no-pictures', dest='draw', action='store_false', help='draw nothing')


def run(
    inputs: list[str],
    checkpoint: str,
    config: str | None,
    out: str,
    score: float,
    device: str | None,
    batch: int,
    draw: bool,
) -> int:
    path = find_config(config) if config else None
    from tqdm import tqdm

    from mmengine_overlock.answers import Answers
    from mmengine_overlock.predict import Pictures, Predictor

    pictures = Pictures(inputs)
    predictor = Predictor(checkpoint, path, device)
    answers = Answers(out, predictor, score, draw)
    for picture, sample in tqdm(predictor.predict(pictures, batch), total=len(pictures), unit='image'):
        answers.add(picture, sample)
    answers.finish()
    print(f'{answers.images} images predicted, results in {out}')
    if pictures.unreadable:
        print('not readable:', *pictures.unreadable, sep='\n  ')
    return int(bool(pictures.unreadable))
