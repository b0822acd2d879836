"""Validate a classifier on an image folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg_value
from torch import Tensor

from imagenet_overlock.checkpoints import training_facts
from imagenet_overlock.confusion import confused_pairs, worst_classes, write_confusion
from imagenet_overlock.data import val_loader
from imagenet_overlock.distributed import join_world
from imagenet_overlock.evaluate import evaluate
from imagenet_overlock.folder import Split, check_validation_folder
from imagenet_overlock.model import Classifier, check_model, load_for_validation
from imagenet_overlock.recipe import Recipe
from overlock.checkpoint import WEIGHTS, find_file
from overlock.utils.errors import UserError
from overlock.utils.files import check_writable, whole_file


@dataclass(frozen=True)
class Validation:
    """The result of a validation: its settings, with the side of the images in pixels, and its figures."""

    model: str
    weights: str
    ema: bool
    img_size: int
    # By index.
    classes: tuple[str, ...]
    figures: dict[str, float]
    confusion: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return what `--results` writes."""
        settings = {name: getattr(self, name) for name in ('model', 'weights', 'ema', 'img_size')}
        return {**settings, **self.figures}

    def write(self, confusion: str | os.PathLike | None, results: str | os.PathLike | None) -> None:
        """Write the confusion matrix and the figures, each where it has a file."""
        if confusion is not None:
            write_confusion(Path(confusion), self.confusion, self.classes)
        if results is not None:
            with whole_file(results) as file:
                file.write((json.dumps(self.to_dict(), indent=2) + '\n').encode())

    def __str__(self) -> str:
        figures = self.figures
        lines = [
            f'{self.model}, {self.weights}{" (EMA)" if self.ema else ""}: {figures["images"]} images at '
            f'{self.img_size}x{self.img_size}',
            f'top-1 {figures["top1"]:.3f}, top-5 {figures["top5"]:.3f}, loss {figures["loss"]:.4f}',
        ]
        if 'aux_top1' in figures:
            lines.append(f'auxiliary head: top-1 {figures["aux_top1"]:.3f}, top-5 {figures["aux_top5"]:.3f}')
        if 'images_per_second' in figures:
            lines.append(f'{figures["images_per_second"]:.1f} images/s')
        pairs = confused_pairs(self.confusion, self.classes, 5)
        if pairs:
            worst = worst_classes(self.confusion, self.classes)
            lines.append('most confused: ' + '; '.join(f'{a} for {b} {count}' for a, b, count in pairs))
            lines.append('worst classes: ' + '; '.join(f'{name} {accuracy:.1f} %' for name, accuracy in worst))
        return '\n'.join(lines)


def validate(
    data_dir: str | os.PathLike,
    model: str | None = None,
    checkpoint: str | None = None,
    pretrained: bool = False,
    ema: bool = False,
    aux: bool = False,
    batch_size: int = 128,
    workers: int = 4,
    img_size: int | None = None,
    crop_pct: float | None = None,
    amp: bool = False,
    device: str | None = None,
    confusion: str | os.PathLike | None = None,
    results: str | os.PathLike | None = None,
) -> Validation:
    """Validate a classifier; several processes share the images.

    Args:
        data_dir: Image folder with a split `val/` or `validation/`, or such a split.
        model: See `create_model`; None for that which a checkpoint of training names.
        checkpoint: A path or URL of weights.
        pretrained: Whether to take the published weights instead.
        ema: Whether to take the averaged weights of the checkpoint.
        aux: Whether to validate the auxiliary head too.
        batch_size: Images of a batch, in each process.
        workers: Processes that read images, for each process.
        img_size: Side of the images in pixels; None for that of the training.
        crop_pct: Side of the center crop over that of the resized image; None for that of the variant, and for 1.0
            above its image size.
        amp: Whether to run in bfloat16 autocast.
        device: Device of torch; None for the GPU where there is one.
        confusion: File for the confusion matrix, ending in .csv or .png.
        results: JSON file for the figures.

    Raises:
        UserError: If data, weights or device cannot be used.
    """
    if pretrained == bool(checkpoint):
        raise UserError('Give either --pretrained or --checkpoint FILE.')
    _check_outputs(confusion, results)
    shared: dict[str, Any] = dict(batch_size=batch_size, workers=workers, img_size=img_size, crop_pct=crop_pct)
    # A recipe checks the settings that it shares with a validation.
    Recipe(mixup=0, cutmix=0, **{name: value for name, value in shared.items() if value is not None})
    with join_world(device) as world:
        split = world.together(lambda: check_validation_folder(data_dir))
        trained = training_facts(find_file(checkpoint)) if checkpoint else {}
        model = model or trained.get('arch')
        if model is None:
            raise UserError('The weights do not tell their model; name it with --model overlock_xt, for example.')
        classes = _classes(trained, split, checkpoint)
        source = os.fspath(checkpoint or _published(model))
        network = load_for_validation(model, source, len(classes), aux, ema).to(world.device)
        img_size, crop_pct = _images(network, source, trained, img_size, crop_pct)
        loader = val_loader(split, world, network, batch_size, workers, img_size, crop_pct, classes)
        found = Validation(
            model, source, ema, img_size, classes, *evaluate(network, loader, world, torch.bfloat16 if amp else None)
        )
        if world.is_first:
            found.write(confusion, results)
    return found


def _check_outputs(confusion: str | os.PathLike | None, results: str | os.PathLike | None) -> None:
    """Check that both are names for files that can be written."""
    for name, path in (('--confusion', confusion), ('--results', results)):
        if path is not None and Path(path).is_dir():
            raise UserError(f'{name} takes the name of a file, got the folder {path}.')
    if confusion is not None and Path(confusion).suffix not in ('.csv', '.png'):
        raise UserError(f'--confusion takes a file name that ends in .csv or .png, got {confusion}.')
    for output in (confusion, results):
        if output is not None:
            check_writable(output)


def _images(
    network: Classifier, source: str, trained: Mapping[str, Any], img_size: int | None, crop_pct: float | None
) -> tuple[int, float | None]:
    """Return image size and crop: those given, else those of the training, of published weights, of the variant."""
    published = WEIGHTS.get(source)
    own = dict(img_size=published.size, crop_pct=published.crop_pct) if published else {}
    args = {**own, **trained.get('args', {})}
    trained_size = args.get('img_size', resolve_data_config({}, model=network)['input_size'][-1])
    img_size = img_size or trained_size
    if crop_pct is None:
        crop_pct = 1.0 if img_size > trained_size else args.get('crop_pct')
    return img_size, crop_pct


def _published(model: str) -> str:
    """Return the name of a model's published weights."""
    check_model(model)
    url = get_pretrained_cfg_value(model, 'url')
    return next(name for name, weights in WEIGHTS.items() if weights.url == url)


def _classes(trained: Mapping[str, Any], split: Split, source: str | None) -> tuple[str, ...]:
    """Return the names of a model's classes: those that its checkpoint lists, else those of the folder."""
    classes = tuple(trained.get('classes', split.classes))
    unknown = sorted(set(split.classes) - set(classes))
    if unknown:
        raise UserError(
            f'{split.root} has the class {unknown[0]}, which {source} was not trained on; give a folder of '
            'the classes that it was trained on.'
        )
    return classes
