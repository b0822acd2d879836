"""Score an exported detector or segmenter on a test set, beside PyTorch, by the evaluators of its configuration."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, DefaultScope

from mmengine_overlock.config import nodes, set_data_root
from mmengine_overlock.export.checks import Run, align
from mmengine_overlock.export.graph import metadata
from mmengine_overlock.export.modules import Preprocessed
from mmengine_overlock.export.subjects import Subject
from mmengine_overlock.predict.exported import Exported, ResizeInside, make_model
from mmengine_overlock.quiet import quiet
from overlock.utils.errors import UserError

# Of what the evaluators return: COCO's averages and segmentation's.
_METRICS = ('mAP', 'mIoU', 'aAcc')


def test_config(subject: Subject, data_root: str | Path, size: tuple[int, int] | None) -> Config:
    """Return the configuration of a subject with its data in another folder, and images inside the fixed size, if any.

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
                node['pipeline'] = [load, dict(type=ResizeInside, size=size), *steps]
    return cfg


@torch.no_grad()
def score(run: Run, runtime: str, subject: Subject, cfg: Config, size: tuple[int, int] | None = None) -> str:
    """Test an exported network and PyTorch's on the test set of a configuration by `test_config`.

    Returns:
        A table of the metrics of both.
    """
    assert subject.model is not None
    exported = Exported(run, metadata(subject), size, isinstance(subject.module, Preprocessed))
    with DefaultScope.overwrite_default_scope(cfg.default_scope), quiet(), contextlib.redirect_stdout(io.StringIO()):
        models: dict[str, Any] = {runtime: make_model(exported), 'PyTorch': subject.model}
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
