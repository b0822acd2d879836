"""Train and test a configuration on a folder of one's own data."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmengine_overlock.config import SPLITS, as_list, enable_auto_scale_lr, nodes
from mmengine_overlock.data.classes import HEADS, class_heads
from mmengine_overlock.data.find_coco import find_coco
from mmengine_overlock.data.find_masks import find_masks
from mmengine_overlock.data.folders import DataFolder, listed
from mmengine_overlock.launch import processes
from mmengine_overlock.terminal import tell
from overlock.utils.distributed import local_rank
from overlock.utils.errors import UserError

_LAYOUTS = {'coco': ('mmdet', 'CocoMetric', 'detectors'), 'masks': ('mmseg', 'IoUMetric', 'segmenters')}
# One of the learning rate takes no more than a tenth of the training; a longer one could fill all of a short training.
_WARM_UP = 10


def find_folder(coco: str | Path | None, masks: str | Path | None, check: bool = True) -> DataFolder | None:
    """Find the data set in the folder that was given, if any.

    Raises:
        UserError: There is none, or it cannot be used without the check of the data.
    """
    if coco is None and masks is None:
        return None
    if coco is not None and masks is not None:
        raise UserError(f'Data is given by --coco {coco} and by --masks {masks}; give one of the two.')
    folder = find_masks(masks) if masks is not None else find_coco(str(coco))
    if not check and not folder.ordered:
        raise UserError(
            f'The annotation files of {folder.root} do not have all categories in the order of their ids, so that '
            'mmdet mislabels them unless the check puts them in order; leave out --no-check.'
        )
    return folder


def use_own_data(cfg: Config, folder: DataFolder, options: dict[str, Any] | None = None) -> None:
    """Point every data set and evaluator to a folder, and give the heads as many outputs as it has classes.

    Pipelines, samplers and schedules stay the configuration's. Where the data has no masks, the mask head is left out.

    Args:
        cfg: Changed in place.
        folder: The data.
        options: Settings by dotted name, over all others.

    Raises:
        UserError: The configuration is for the other task, or has no data set, evaluator or head to change.
    """
    scope, metric, subject = _LAYOUTS[folder.layout]
    if cfg.get('default_scope') != scope:
        raise UserError(
            f"--{folder.layout} is for {subject}, with default_scope = '{scope}', and {cfg.filename} has "
            f'{cfg.get("default_scope")!r}; take another configuration, `overlock configs` lists those of each task.'
        )
    heads = [head for _, head in class_heads(cfg.model)]
    if not heads:
        raise UserError(f'The model {cfg.model.type} has none of the heads {", ".join(HEADS)}, whose classes are set.')
    for head in heads:
        head['num_classes'] = len(folder.classes)
        # One output can tell two classes apart; else it is as many as classes.
        if head.get('out_channels') and (head['out_channels'], len(folder.classes)) != (1, 2):
            head.pop('out_channels')
    if not folder.masks:
        _leave_masks_out(cfg)
    for split in SPLITS:
        if cfg.get(f'{split}_dataloader'):
            _set_dataset(cfg, folder, split)
        if cfg.get(f'{split}_evaluator'):
            _set_evaluator(cfg, folder, split, metric)
    # Variables of the configuration, which would tell of other data.
    for name, value in (('data_root', str(folder.root)), ('metainfo', folder.metainfo)):
        if name in cfg:
            cfg[name] = value
    cfg.merge_from_dict(options or {})
    sizes = ', '.join(f'{part.count} for {split}' for split, part in folder.parts.items())
    names = listed(folder.classes, most=10)
    _tell(f'Data in {folder.root}: {len(folder.classes)} classes ({names}), labeled images {sizes}.')
    for remark in folder.remarks:
        _tell(remark)


def fit_training(cfg: Config, folder: DataFolder, options: dict[str, Any] | None = None) -> None:
    """Scale the learning rate by the total batch size, and shorten a warm-up that takes most of a short training.

    Args:
        cfg: Changed in place.
        folder: The data.
        options: Settings by dotted name; a learning rate among them is not scaled, a warm-up not shortened.
    """
    options = options or {}
    batch = cfg.train_dataloader.batch_size * processes(cfg.launcher)
    _scale_rate(cfg, batch, options)
    epochs = cfg.train_cfg.get('max_epochs')
    repeats = [node['times'] for node in nodes(cfg.train_dataloader.dataset) if node.get('type') == 'RepeatDataset']
    images = folder.parts['train'].count * math.prod(repeats)
    iterations = cfg.train_cfg.get('max_iters') or epochs * -(-images // batch)
    schedulers = as_list(cfg.get('param_scheduler'))
    given = {name.split('.')[1] for name in options if name.startswith('param_scheduler.')}
    # One that is not in a list has settings instead of a place.
    if 'param_scheduler' not in options and all(map(str.isdigit, given)):
        _shorten_warm_up(schedulers, iterations, given)
    for place, scheduler in enumerate(schedulers):
        end, last = scheduler.get('end'), epochs if scheduler.get('by_epoch', True) else iterations
        if end and last and end > last + 1:
            remedy = f'param_scheduler.{place}.end={last}'
            if 'milestones' in scheduler:
                steps = [max(1, step * last // end) for step in scheduler.milestones]
                remedy += f' param_scheduler.{place}.milestones="{steps}"'.replace(', ', ',')
            _tell(
                f'The learning rate stops on its way: {scheduler.type} ends at {end}, the training at {last}; give '
                f'--cfg-options {remedy} to end with it.',
                logging.WARNING,
            )


def _scale_rate(cfg: Config, batch: int, options: dict[str, Any]) -> None:
    rate, base = cfg.optim_wrapper.optimizer.get('lr', 0), cfg.get('auto_scale_lr', {}).get('base_batch_size')
    given = 'optim_wrapper.optimizer.lr' in options or options.get('auto_scale_lr.enable') is False
    if base and not given:
        enable_auto_scale_lr(cfg)
    if base and cfg.auto_scale_lr.get('enable'):
        _tell(f'Learning rate {rate * batch / base:g} for {batch} images a step, from {rate:g} for {base}.')
        if (steps := cfg.optim_wrapper.get('accumulative_counts', 1)) > 1:
            _tell(
                f'An update takes {steps} steps, which this learning rate does not count; give another one by '
                '--cfg-options optim_wrapper.optimizer.lr=NUMBER.',
                logging.WARNING,
            )
    else:
        reason = 'given' if given else 'the configuration has no auto_scale_lr.base_batch_size'
        _tell(f'Learning rate {rate:g}, not scaled to {batch} images a step, as {reason}.')


def _shorten_warm_up(schedulers: list[dict], iterations: int, given: Collection[str]) -> None:
    longest = max(2, iterations // _WARM_UP + 1)
    for place, scheduler in enumerate(schedulers):
        end = scheduler.get('end', 0)
        if scheduler['type'] != 'LinearLR' or scheduler.get('by_epoch', True) or end <= longest or str(place) in given:
            continue
        for other in schedulers:
            other.update({'begin': longest} if other.get('begin') == end else {})
        scheduler['end'] = longest
        _tell(f'Warm-up of {longest - 1} iterations instead of {end - 1}, as the training has {iterations}.')


def _leave_masks_out(cfg: Config) -> None:
    if 'mask_head' in cfg.model:
        raise UserError(f'The annotations have no masks, and {cfg.model.type} finds nothing else; take a box detector.')
    for name in ('mask_head', 'mask_roi_extractor'):
        cfg.model.get('roi_head', {}).pop(name, None)
    for node in nodes([value for _, value in cfg.items()]):
        node.update({name: False for name in ('with_mask', 'pad_mask') if node.get(name)})


def _set_dataset(cfg: Config, folder: DataFolder, split: str) -> None:
    # Not the wrappers, which may have pipelines, too.
    datasets = [
        node
        for node in nodes(cfg[f'{split}_dataloader'].get('dataset'))
        if 'pipeline' in node and not node.keys() & {'dataset', 'datasets'}
    ]
    if len(datasets) != 1:
        raise UserError(
            f'{split}_dataloader of {cfg.filename} has {len(datasets)} data sets with a pipeline, expected one, which '
            f'--{folder.layout} replaces.'
        )
    dataset = datasets[0]
    dataset.pop('ann_file', None)
    dataset.update(folder.dataset(split))
    # The data set tells the transform.
    for node in nodes(dataset['pipeline']):
        node.pop('reduce_zero_label', None)


def _set_evaluator(cfg: Config, folder: DataFolder, split: str, metric: str) -> None:
    evaluators = [node for node in as_list(cfg[f'{split}_evaluator']) if str(node.get('type')).endswith(metric)]
    if not evaluators:
        raise UserError(
            f'{split}_evaluator of {cfg.filename} has no {metric}, by which --{folder.layout} is evaluated.'
        )
    others = [str(node.get('type')) for node in as_list(cfg[f'{split}_evaluator']) if node not in evaluators]
    if others:
        _tell(f'{split}_evaluator keeps {metric} alone, without {listed(others)}.', logging.WARNING)
    for evaluator in evaluators if folder.layout == 'coco' else ():
        evaluator.ann_file = str(folder.parts.get(split, folder.parts['val']).labels)
        evaluator.pop('format_only', None)
        kinds = [kind for kind in as_list(evaluator.get('metric', 'bbox')) if folder.masks or kind != 'segm']
        evaluator.metric = kinds or ['bbox']
    cfg[f'{split}_evaluator'] = evaluators if len(evaluators) > 1 else evaluators[0]


def _tell(message: str, level: int = logging.INFO) -> None:
    if local_rank() == 0:
        tell(message, level)
