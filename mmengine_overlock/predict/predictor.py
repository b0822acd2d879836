"""Predict with a trained or exported detector or segmenter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope

from mmengine_overlock.predict.network import open_checkpoint
from mmengine_overlock.predict.pictures import Picture, Pictures
from mmengine_overlock.predict.tiles import OVERLAP, merge, places
from overlock.utils.errors import UserError

# Tiles of fewer pixels have too little around an object.
_LEAST_TILE = 64


class Predictor:
    """A trained or exported detector or segmenter, ready to predict.

    Args:
        model: A checkpoint, by path, URL or published name; or a file of `overlock export` that ends in `.onnx`, which
            onnxruntime runs.
        config: The configuration of a checkpoint, by name or path; by default that of published weights, or the one
            that the checkpoint carries.
        device: Such as 'cuda:0' or 'cpu'; by default a GPU where there is one.
        score: Boxes below it are left out.
        tile: Sides (in pixels) of the tiles that larger images are predicted in; None for whole images. A detector sees
            each tile as it would see an image, and the image too; sahi merges what they find. A segmenter sees tiles in
            the image's own resolution: mmseg's inference by sliding windows, which averages logits.
        batch: Images or tiles of a step, at most; those of different sizes go in steps of their own, so that none is
            padded for another.
        deploy: Whether to tune the network for inference, which predicts the same up to rounding, faster.

    Attributes:
        model: The network, in evaluation, on the device.
        scope: 'mmdet' or 'mmseg'.
        classes: Names of the classes, in the order of the labels.
        palette: Colors of the classes, as red, green and blue; None for colors of any kind.

    Raises:
        UserError, CheckpointError: What was given cannot be used; one sentence says why.
    """

    def __init__(
        self,
        model: str | Path,
        config: str | Path | None = None,
        device: str | torch.device | None = None,
        *,
        score: float = 0.0,
        tile: int | None = None,
        batch: int = 1,
        deploy: bool = True,
    ) -> None:
        if batch < 1:
            raise UserError(f'The batch must be at least 1 image, got {batch}.')
        if tile is not None and tile < _LEAST_TILE:
            raise UserError(f'Tiles must have sides of at least {_LEAST_TILE} pixels, got {tile}.')
        if Path(model).suffix in ('.engine', '.pt2', '.xml'):
            raise UserError(f'{model} is for other programs; export with --format onnx to predict here.')
        if Path(model).suffix == '.onnx':
            from mmengine_overlock.predict.exported import open_exported

            if config is not None:
                raise UserError(f'{model} carries all that its predictions need; leave the configuration out.')
            network = open_exported(Path(model), device, tile)
        else:
            network = open_checkpoint(model, config, device, deploy)
        # Cascade's masks make it say so.
        warnings.filterwarnings('ignore', 'To copy construct from a tensor', UserWarning, r'mmdet\.')
        if tile and network.scope == 'mmdet' and find_spec('sahi') is None:
            raise UserError('Tiles need sahi; install it with `pip install sahi`, or predict whole images.')
        self.model: Any = network.model
        self.scope, self.classes, self.palette = network.scope, network.classes, network.palette
        self.score, self.tile, self.batch = score, tile, batch
        with DefaultScope.overwrite_default_scope(self.scope):
            self.pipeline = Compose(network.pipeline)
            self.unscaled = Compose([step for step in network.pipeline if not _scales(step)])

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Return mmdet's or mmseg's data samples for images, each (H, W, 3), uint8, blue first.

        Returns:
            Of a detector, `pred_instances`, on the CPU, in pixels of the image: bboxes (N, 4), float32, x1, y1, x2, y2;
            scores (N,), sorted; labels (N,), int64; with a mask head masks (N, H, W), bool. Of a segmenter,
            `pred_sem_seg.data` (1, H, W), int64.
        """
        if self.tile is None:
            samples = self._run(images, self.pipeline)
        else:
            samples = [self._tiled(image) for image in images]
        for sample in samples:
            if 'pred_instances' in sample:
                sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= self.score].cpu()
        return samples

    def predict(self, inputs: Pictures | Sequence[str | Path] | str | Path) -> Iterator[tuple[Picture, Any]]:
        """Yield each image below some inputs (see `Pictures`) with its data sample."""
        inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
        waiting = iter(inputs if isinstance(inputs, Pictures) else Pictures(inputs))
        while group := list(islice(waiting, self.batch)):
            yield from zip(group, self([picture.pixels for picture in group]), strict=True)

    def _run(self, images: Sequence[np.ndarray], pipeline: Compose) -> list[Any]:
        samples: list[Any] = []
        with DefaultScope.overwrite_default_scope(self.scope):
            # One after another: a large image has thousands of tiles.
            items = (pipeline(dict(img=image, img_id=index)) for index, image in enumerate(images))
            # mmseg warns of a batch of images that had other sizes.
            for _, same in groupby(items, key=lambda item: (item['inputs'].shape, item['data_samples'].ori_shape)):
                while step := list(islice(same, self.batch)):
                    samples += self.model.test_step(pseudo_collate(step))
        return samples

    def _tiled(self, image: np.ndarray) -> Any:
        assert self.tile
        if max(image.shape[:2]) <= self.tile:
            return self._run([image], self.pipeline)[0]
        if self.scope == 'mmdet':
            tiles = places(image.shape[0], image.shape[1], self.tile)
            samples = self._run([image[y1:y2, x1:x2] for x1, y1, x2, y2 in tiles], self.pipeline)
            return merge(tiles, samples, self.score)
        stride = round(self.tile * (1 - OVERLAP))
        settings = dict(mode='slide', crop_size=(self.tile, self.tile), stride=(stride, stride))
        before, self.model.test_cfg = self.model.test_cfg, ConfigDict(settings)
        try:
            return self._run([image], self.unscaled)[0]
        finally:
            self.model.test_cfg = before


def _scales(step: Any) -> bool:
    """Return whether a transform brings images to a size for the network."""
    kind = step['type'] if isinstance(step, dict) else type(step).__name__
    return str(kind).rpartition('.')[2] in ('Resize', 'ResizeInside', 'ResizeShortestEdge')
