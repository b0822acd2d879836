"""Predict with a trained detector or segmenter."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope

from mmengine_overlock.config import load_config, nodes
from mmengine_overlock.embedded import embedded_config
from overlock.checkpoint import WEIGHTS, find_file
from overlock.checkpoint.fitting import compare_weights
from overlock.utils.errors import UserError

_IMAGES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
_VIDEOS = ('.avi', '.mkv', '.mov', '.mp4', '.webm')


@dataclass(frozen=True)
class Picture:
    """An image to predict.

    Attributes:
        source: The file of the image or of its video.
        pixels: (H, W, 3), uint8, in the order blue, green, red.
        frame: Number of the frame in a video, from 0; None for an image.
    """

    source: Path
    pixels: np.ndarray
    frame: int | None = None


@dataclass
class Pictures:
    """The images below files, folders, patterns, and in videos, read one after another.

    A folder stands for the images and videos in it, sorted, without those in its folders.

    Attributes:
        inputs: What was asked for.
        unreadable: The files that could not be decoded, filled while the images are read.

    Raises:
        UserError: An input does not exist, or there is nothing to predict.
    """

    inputs: Sequence[str | Path]
    unreadable: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.files = [file for name in self.inputs for file in _files(str(name))]

    def __len__(self) -> int:
        """Return the number of images and frames, as far as the headers tell."""
        return sum(self._frames(file) if _is_video(file) else 1 for file in self.files)

    def __iter__(self) -> Iterator[Picture]:
        for file in self.files:
            if _is_video(file):
                yield from self._video(file)
                continue
            # Unlike cv2.imread, this takes a name of any letters.
            pixels = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR) if file.stat().st_size else None
            if pixels is None:
                self.unreadable.append(file)
            else:
                yield Picture(file, pixels)

    def _video(self, file: Path) -> Iterator[Picture]:
        video = cv2.VideoCapture(str(file))
        number = 0
        while (read := video.read())[0]:
            yield Picture(file, read[1], number)
            number += 1
        video.release()
        if not number:
            self.unreadable.append(file)

    @staticmethod
    def _frames(file: Path) -> int:
        return max(0, int(cv2.VideoCapture(str(file)).get(cv2.CAP_PROP_FRAME_COUNT)))


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in _VIDEOS


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    found = sorted(path.iterdir()) if path.is_dir() else [Path(file) for file in sorted(glob.glob(str(path)))]
    found = [file for file in found if file.suffix.lower() in _IMAGES + _VIDEOS and file.is_file()]
    if not found:
        kinds = ', '.join(_IMAGES + _VIDEOS)
        raise UserError(f'{name} is no image, video, or folder or pattern of them; expected files that end in {kinds}.')
    return found


class Predictor:
    """A trained detector or segmenter, ready to predict.

    Args:
        checkpoint: Its weights: a path, URL or published name.
        config: Its configuration, by name or path; by default that of published weights, or the one that the checkpoint
            carries.
        device: Such as 'cuda:0' or 'cpu'; by default a GPU where there is one.
        deploy: Whether to fold the backbone, which predicts the same, faster.

    Attributes:
        model: The network, in evaluation, on the device.
        cfg: Its configuration.
        scope: 'mmdet' or 'mmseg'.
        classes: Names of the classes, in the order of the labels.
        palette: Colors of the classes, as red, green and blue; None for the toolbox's own.

    Raises:
        UserError, CheckpointError: What was given cannot be used; one sentence says why.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        config: str | Path | None = None,
        device: str | torch.device | None = None,
        deploy: bool = True,
    ) -> None:
        from mmengine.runner import CheckpointLoader

        file = find_file(checkpoint)
        published = WEIGHTS.get(str(checkpoint))
        config = config or (published.config if published else None)
        content = CheckpointLoader.load_checkpoint(str(file), map_location='cpu', logger='silent')
        self.cfg = embedded_config(content, str(file)) if config is None else load_config(config)
        self.scope = self.cfg.default_scope
        self.device = torch.device(device or get_device())
        self.model = build_model(self.cfg)
        tensors = content.get('state_dict', content)
        compare_weights(self.model, tensors, str(file)).require('give the configuration that it was trained with')
        self.model.load_state_dict(tensors)
        backbone: Any = getattr(self.model, 'backbone', None)
        if deploy and hasattr(backbone, 'switch_to_deploy'):
            backbone.switch_to_deploy()
        self.model.to(self.device)
        meta = {key.lower(): value for key, value in (content.get('meta', {}).get('dataset_meta') or {}).items()}
        meta = meta or dataset_meta(self.cfg)
        self.classes, self.palette = tuple(meta.get('classes') or ()), meta.get('palette')
        with DefaultScope.overwrite_default_scope(self.scope):
            self.pipeline = Compose(test_pipeline(self.cfg, dict(type='LoadImageFromNDArray')))

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Return mmdet's or mmseg's data samples for images, each (H, W, 3), uint8, blue first."""
        with DefaultScope.overwrite_default_scope(self.scope):
            items = [self.pipeline(dict(img=image, img_id=index)) for index, image in enumerate(images)]
            return self.model.test_step(pseudo_collate(items))

    def predict(
        self, inputs: Pictures | Sequence[str | Path] | str | Path, batch: int = 1
    ) -> Iterator[tuple[Picture, Any]]:
        """Yield each image below some inputs (see `Pictures`) with its data sample."""
        inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
        pictures = inputs if isinstance(inputs, Pictures) else Pictures(inputs)
        if batch < 1:
            raise UserError(f'The batch must be at least 1 image, got {batch}.')
        waiting = iter(pictures)
        while group := list(islice(waiting, batch)):
            yield from zip(group, self([picture.pixels for picture in group]), strict=True)


def build_model(cfg: Config) -> BaseModel:
    """Build the model of a configuration in evaluation, without loading weights that it would start from."""
    settings = deepcopy(cfg.model)
    for node in nodes(settings):
        node.pop('init_cfg', None)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        return revert_sync_batchnorm(MODELS.build(settings)).eval()


def test_pipeline(cfg: Config, load: dict | None = None) -> list[dict]:
    """Return the test pipeline of a configuration without a step that loads truth; `load` replaces its first step.

    Raises:
        UserError: There is none.
    """
    found = [node['pipeline'] for node in nodes(cfg.get('test_dataloader')) if node.get('pipeline')]
    if not found:
        raise UserError('The configuration has no test pipeline: expected `test_dataloader.dataset.pipeline`.')
    steps = [step for step in found[0] if 'Annotations' not in str(step['type'])]
    return steps if load is None else [load, *steps[1:]]


def dataset_meta(cfg: Config) -> dict[str, Any]:
    """Return classes and palette of the data set that a configuration tests on, without its files."""
    dataset = next((node for node in nodes(cfg.get('test_dataloader')) if 'pipeline' in node), {})
    kind = DATASETS.get(f'{cfg.default_scope}.{dataset["type"]}') if 'type' in dataset else None
    return {**getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {})}
