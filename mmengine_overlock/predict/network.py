"""Open trained detectors and segmenters."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope

from mmengine_overlock.config import load_config, nodes
from mmengine_overlock.embedded import embedded_config
from mmengine_overlock.quiet import quiet
from mmengine_overlock.speed import tune_for_inference
from overlock.checkpoint import WEIGHTS, find_file
from overlock.checkpoint.fitting import compare_weights
from overlock.utils.errors import UserError


@dataclass
class Network:
    """A detector or segmenter, ready to predict.

    Attributes:
        model: Gives data samples by its `test_step`, as those of mmdet and mmseg; in evaluation, on its device.
        scope: 'mmdet' or 'mmseg'.
        pipeline: The transforms from an array to its input.
        classes: Names of the classes, in the order of the labels.
        palette: Colors of the classes, as red, green and blue; None for colors of any kind.
    """

    model: BaseModel
    scope: str
    pipeline: list[Any]
    classes: tuple[str, ...] = ()
    palette: list | None = None


def open_checkpoint(
    checkpoint: str | Path, config: str | Path | None, device: str | torch.device | None, deploy: bool
) -> Network:
    """Open trained weights; see `Predictor`."""
    from mmengine.runner import CheckpointLoader

    file = find_file(checkpoint)
    published = WEIGHTS.get(str(checkpoint))
    config = config or (published.config if published else None)
    content = CheckpointLoader.load_checkpoint(str(file), map_location='cpu', logger='silent')
    cfg = embedded_config(content, str(file)) if config is None else load_config(config)
    model = build_model(cfg)
    tensors = content.get('state_dict', content)
    compare_weights(model, tensors, str(file)).require('give the configuration that it was trained with')
    model.load_state_dict(tensors)
    try:
        model.to(torch.device(device or get_device()))
    # Of a name that is none, and of CUDA where there is none.
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f'The device {device} cannot be used here ({str(error).splitlines()[0]}); give cpu, or leave it out.'
        ) from None
    if deploy:
        tune_for_inference(model)
    meta = {key.lower(): value for key, value in (content.get('meta', {}).get('dataset_meta') or {}).items()}
    meta = meta or dataset_meta(cfg)
    pipeline = test_pipeline(cfg, dict(type='LoadImageFromNDArray'))
    return Network(model, cfg.default_scope, pipeline, tuple(meta.get('classes') or ()), meta.get('palette'))


def build_model(cfg: Config) -> BaseModel:
    """Build the model of a configuration in evaluation, without loading weights that it would start from."""
    settings = deepcopy(cfg.model)
    for node in nodes(settings):
        node.pop('init_cfg', None)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')), quiet():
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
