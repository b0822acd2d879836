"""Score an exported detector or segmenter on a test set, beside PyTorch, by the evaluators of its configuration."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor
from torch.nn import functional as F

from mmengine_overlock.config import nodes, set_data_root
from mmengine_overlock.export.checks import Run, align
from mmengine_overlock.export.modules import Preprocessed
from mmengine_overlock.export.quiet import quiet
from mmengine_overlock.export.subjects import Subject
from mmengine_overlock.predict.exported import to_instances
from overlock.utils.errors import UserError

# Of what the evaluators return: COCO's averages and segmentation's.
_METRICS = ('mAP', 'mIoU', 'aAcc')


def test_config(subject: Subject, data_root: str | Path, size: tuple[int, int] | None) -> Config:
    """Return the configuration of a subject with its data in another folder, and images of the fixed size, if any.

    Raises:
        UserError: The subject is neither a detector nor a segmenter, or the folder does not exist.
    """
    if subject.kind not in ('detector', 'segmenter'):
        raise UserError(f'--data-root is for detectors and segmenters, and this is a {subject.kind}; leave it out')
    cfg = copy.deepcopy(subject.cfg)
    assert cfg is not None
    set_data_root(cfg, data_root)
    if size:
        for node in nodes(cfg.test_dataloader):
            if 'pipeline' in node:
                load, *steps = [step for step in node['pipeline'] if 'Resize' not in step['type']]
                node['pipeline'] = [load, dict(type='Resize', scale=size[::-1], keep_ratio=False), *steps]
    return cfg


@torch.no_grad()
def score(run: Run, runtime: str, subject: Subject, cfg: Config, size: tuple[int, int] | None = None) -> str:
    """Test an exported network and PyTorch's on the test set of a configuration by `test_config`.

    Returns:
        A table of the metrics of both.
    """
    assert subject.model is not None
    # mmdet pads to multiples of its divisor, also images of the fixed size.
    exported = run if size is None else lambda images: run(images[..., : size[0], : size[1]])
    models = {runtime: _exported(exported, subject), 'PyTorch': subject.model}
    with DefaultScope.overwrite_default_scope(cfg.default_scope), quiet(), contextlib.redirect_stdout(io.StringIO()):
        dataset: Any = DATASETS.build(cfg.test_dataloader.dataset)
        evaluators = {name: Evaluator(copy.deepcopy(cfg.test_evaluator)) for name in models}
        for evaluator in evaluators.values():
            evaluator.dataset_meta = dataset.metainfo
        for index in range(len(dataset)):
            data = pseudo_collate([dataset[index]])
            for name, model in models.items():
                own = copy.deepcopy(data)
                evaluators[name].process(data_samples=model.test_step(own), data_batch=own)
        found = {name: evaluator.evaluate(len(dataset)) for name, evaluator in evaluators.items()}
    metrics = [name for name in found['PyTorch'] if name.endswith(_METRICS)]
    rows = [[name, *(f'{results.get(name, 0):.4g}' for results in found.values())] for name in metrics]
    return align([[f'test set, {len(dataset)} images', *found], *(rows or [['nothing was detected']])])


def _exported(run: Run, subject: Subject) -> BaseModel:
    """Return mmdet's or mmseg's model with an exported file in the place of its network."""
    model: Any = copy.copy(subject.model)

    def infer(inputs: Tensor, height: int, width: int) -> Sequence[Tensor]:
        if not isinstance(subject.module, Preprocessed):
            return run(inputs)
        mean, std = (inputs.new_tensor(subject.info[name]).view(-1, 1, 1) for name in ('mean', 'std'))
        pixels = (inputs[..., :height, :width] * std + mean).round().clamp(0, 255)
        return run(pixels.to(torch.uint8))

    def predict(inputs: Tensor, samples: Sequence[Any], rescale: bool = True) -> Sequence[Any]:
        for sample, image in zip(samples, inputs, strict=True):
            outs = [out[0] for out in infer(image[None], *sample.img_shape)]
            sample.pred_instances = to_instances(outs, sample, subject.info.get('mask_threshold'))
        return samples

    def encode_decode(inputs: Tensor, metas: Sequence[dict]) -> Tensor:
        out = infer(inputs, *inputs.shape[2:])[0]
        if out.ndim == 4:
            return out
        return F.one_hot(out, len(subject.info['classes'])).movedim(-1, 1).float()

    if subject.kind == 'detector':
        model.predict = predict
    else:
        model.encode_decode = encode_decode
    return model
