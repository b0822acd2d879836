"""Options of training that add hooks and programs to log to."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmengine_overlock.config import as_list
from overlock.utils.errors import UserError

_BACKENDS = {'tensorboard': 'TensorboardVisBackend', 'wandb': 'WandbVisBackend', 'mlflow': 'MLflowVisBackend'}


def add_backend(cfg: Config, name: str) -> None:
    """Log to another program too; local files are below `<work_dir>/<time>/vis_data`.

    MLflow logs to the server of the variable `MLFLOW_TRACKING_URI`, or else to `<work_dir>/mlflow.db`.

    Args:
        cfg: The configuration.
        name: 'tensorboard', 'wandb' or 'mlflow', which is also its package.

    Raises:
        UserError: The package is not installed.
    """
    # A folder of runs, as wandb's, is found as a package without a file.
    if getattr(find_spec(name), 'origin', None) is None:
        raise UserError(f'--{name} needs the package {name}, which is not installed; run: pip install {name}')
    visualizer = cfg.get('visualizer') or dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
    backends = as_list(visualizer.get('vis_backends'))
    added: dict[str, Any] = dict(type=_BACKENDS[name])
    # mmengine would write files in any case, which MLflow 3 refuses.
    if name == 'mlflow' and (server := os.environ.get('MLFLOW_TRACKING_URI')):
        added['tracking_uri'] = server
    elif name == 'mlflow':
        folder = Path(cfg.get('work_dir') or '.').absolute()
        added |= dict(tracking_uri=f'sqlite:///{folder}/mlflow.db', exp_name=folder.name)
        # At the end of a run mmengine copies files of these suffixes out of the work folder, earlier copies too.
        added |= dict(artifact_location=(folder / 'mlflow').as_uri(), artifact_suffix=())
    if not any(backend['type'] == added['type'] for backend in backends):
        visualizer['vis_backends'] = [*backends, added]
    cfg.visualizer = visualizer


def average_weights(cfg: Config) -> None:
    """Keep a running average of the weights, which is validated and saved as the model's.

    Its momentum is 0.0002, and at iteration t at least 10 / (10 + t): the average of a short run does not stay at the
    weights that it started from.
    """
    hooks = as_list(cfg.get('custom_hooks'))
    if not any(hook['type'] == 'EMAHook' for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='EMAHook', ema_type='MomentumAnnealingEMA', momentum=0.0002, gamma=10)]


def stop_early(cfg: Config, patience: int) -> None:
    """End the training after so many validations in a row without a better score; the best checkpoint is kept.

    The score is the one of the checkpoint hook's `save_best`, else box AP, mask AP or mIoU by the evaluator.

    Raises:
        UserError: There is no such number, no validation, or no known score.
    """
    if patience < 1:
        raise UserError(f'--early-stop takes a number of validations, at least 1, got {patience}.')
    if cfg.get('val_cfg') is None:
        raise UserError(
            f'--early-stop needs validations, and {cfg.filename} has no val_cfg; add val_cfg and val_dataloader.'
        )
    hook = cfg.setdefault('default_hooks', {}).setdefault('checkpoint', dict(type='CheckpointHook'))
    scores = [score for score in as_list(hook.get('save_best')) if score != 'auto']
    for evaluator in as_list(cfg.get('val_evaluator')):
        if evaluator['type'] == 'CocoMetric':
            scores.append(f'coco/{as_list(evaluator.get("metric", "bbox"))[0]}_mAP')
        elif evaluator['type'] == 'IoUMetric':
            scores.append('mIoU')
    if not scores:
        raise UserError(
            '--early-stop does not know the score to watch; name it by --cfg-options '
            'default_hooks.checkpoint.save_best=NAME, and default_hooks.checkpoint.rule=less if less is better.'
        )
    hook['save_best'] = hook.get('save_best') or scores[0]
    rule = as_list(hook.get('rule'))
    stop = dict(type='EarlyStopHook', monitor=scores[0], patience=patience, rule=rule[0] if rule else None)
    cfg.custom_hooks = [*as_list(cfg.get('custom_hooks')), stop]
