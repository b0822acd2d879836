"""Tell what a run works on, how far it is, what validations give, and where the weights are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.hooks import Hook, LoggerHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from mmengine_overlock.terminal import Terminal, tell


class TerminalHook(Hook):
    """Let a run tell its progress on a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def before_train(self, runner: Runner) -> None:
        loaders = dict(training=runner.train_dataloader)
        if runner.val_loop is not None:
            loaders['validation'] = runner.val_dataloader
        self._introduce(runner, loaders)
        tell_about('schedule', _schedule(runner))
        self._tell_places(runner)
        self._interval = next((hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)), 10)
        self._terminal.begin('training', runner.max_iters, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        done = runner.iter + 1
        self._terminal.advance(done, _losses(runner), done % self._interval == 0 or done == runner.max_iters)

    def after_train(self, runner: Runner) -> None:
        self._terminal.end()
        if runner.iter < runner.max_iters:
            tell(f'The training ended early, after iteration {runner.iter} of {runner.max_iters}.')
        known = runner.message_hub.runtime_info
        for name, path in known.items():
            if name.startswith(('last_ckpt', 'best_ckpt')) and path and Path(path).exists():
                score = known.get(name.replace('ckpt', 'score'))
                scored = f' ({score:.4g})' if isinstance(score, float) else ''
                tell_about(f'{name[:4]} weights', f'{_short(path)}{scored}')

    def before_val_epoch(self, runner: Runner) -> None:
        self._terminal.begin('validation', len(runner.val_dataloader))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._step(batch_idx + 1, len(runner.val_dataloader))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._terminal.end()
        epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
        place = f'epoch {runner.epoch}' if epochs else f'iteration {runner.iter}'
        tell('\n'.join([f'validation after {place}', *_table(metrics or {})]))

    def before_test_epoch(self, runner: Runner) -> None:
        self._introduce(runner, dict(test=runner.test_dataloader))
        self._tell_places(runner)
        self._terminal.begin('test', len(runner.test_dataloader))

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._step(batch_idx + 1, len(runner.test_dataloader))

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._terminal.end()
        tell('\n'.join(['test', *_table(metrics or {})]))

    def _step(self, done: int, total: int) -> None:
        self._terminal.advance(done)
        if done == total:
            self._terminal.end()
            self._terminal.begin('evaluation')

    def _introduce(self, runner: Runner, loaders: dict[str, DataLoader]) -> None:
        self._terminal.end()
        tell_about('configuration', _short(runner.cfg.filename))
        datasets: dict[str, Any] = {name: loader.dataset for name, loader in loaders.items()}
        tell_about('data', ', '.join(f'{name} {len(dataset):,} images' for name, dataset in datasets.items()))
        classes = (getattr(next(iter(datasets.values())), 'metainfo', None) or {}).get('classes')
        if classes:
            named = ', '.join(classes[:6])
            tell_about('classes', f'{len(classes)}: {named}{", ..." if len(classes) > 6 else ""}')
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        tell_about('model', _model(runner, model))
        tell_about('weights', _weights(runner, model))
        tell_about('device', _device(runner))

    def _tell_places(self, runner: Runner) -> None:
        tell_about('results', _short(runner.work_dir))
        tell_about('log', _short(runner.logger.log_file))


def tell_about(what: str, text: str) -> None:
    """Write a line of the list that a run begins and ends with."""
    tell(f'{what:<14}{text}')


def _short(path: str) -> str:
    """Return a path as seen from the current folder, if it is below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _model(runner: Runner, model: nn.Module) -> str:
    backbone = runner.cfg.get('model', {}).get('backbone') or {}
    arch = backbone.get('arch', '')
    name = f'{backbone.get("type")}{f"-{arch.upper()}" if isinstance(arch, str) and arch else ""}'
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
    frozen = f', {(total - trained) / 1e6:.2f} M of them frozen' if trained < total else ''
    return f'{type(model).__name__}{f" with {name}" if backbone else ""}, {total / 1e6:.2f} M parameters{frozen}'


def _weights(runner: Runner, model: nn.Module) -> str:
    if runner._resume:
        return f'{_short(runner._load_from)}, resumed after iteration {runner.iter}'
    if runner._load_from:
        return _short(runner._load_from)
    given = {name: getattr(module, 'init_cfg', None) for name, module in model.named_modules()}
    files = {name: cfg['checkpoint'] for name, cfg in given.items() if isinstance(cfg, dict) and cfg.get('checkpoint')}
    return ', '.join(f'{file} ({name or "whole model"})' for name, file in files.items()) or 'random'


def _device(runner: Runner) -> str:
    processes = f'{get_world_size()} processes on ' if get_world_size() > 1 else ''
    if get_device() == 'cuda':
        return f'{processes}{torch.cuda.get_device_name()}'
    threads = torch.get_num_threads()
    return f'{processes}{get_device()}, {threads} thread{"s" * (threads > 1)}'


def _schedule(runner: Runner) -> str:
    loop, wrapper = runner.train_loop, runner.optim_wrapper
    epochs = isinstance(loop, EpochBasedTrainLoop)
    length = f'{loop.max_epochs} epochs, ' if epochs else ''
    batch = getattr(runner.train_dataloader.batch_sampler, 'batch_size', 0) * get_world_size()
    rate = max(group.get('initial_lr', group['lr']) for group in wrapper.param_groups)
    precision = type(wrapper).__name__.removesuffix('OptimWrapper')
    validation = f', validation every {loop.val_interval}' if runner.val_loop is not None else ''
    return (
        f'{length}{loop.max_iters:,} iterations of {batch} images{validation}, {type(wrapper.optimizer).__name__}, '
        f'learning rate {rate:.3g}{f", {precision}" if precision else ""}'
    )


def _losses(runner: Runner) -> dict[str, float]:
    """Return the recent loss, and its terms summed by kind, such as `bbox` over all heads and stages."""
    window = runner.log_processor.window_size
    terms: dict[str, float] = defaultdict(float)
    for name, history in runner.message_hub.log_scalars.items():
        if name.startswith('train/') and 'loss' in name:
            terms[name.removeprefix('train/').rpartition('_')[2]] += float(history.mean(window))
    return dict(terms) if len(terms) > 2 else {name: value for name, value in terms.items() if name == 'loss'}


def _table(metrics: dict[str, Any]) -> Iterator[str]:
    """Yield a line of metrics for each kind: `coco/bbox_mAP_50` is `mAP_50` of `bbox`."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, value in metrics.items():
        name = name.partition('/')[2] or name
        if name.endswith('_precision'):
            # mmdet's, of a class.
            measure, _, kind = name.rpartition('_')
        else:
            kind, _, measure = name.rpartition('/')[2].partition('_')
        # COCO's tools give -1 where there is nothing to measure.
        text = 'none' if value == -1 else f'{value:.3f}' if isinstance(value, float) else str(value)
        kinds[kind if measure else ''].append(f'{measure or kind} {text}')
    for kind, values in kinds.items():
        yield f'  {kind:<{12 * bool(kind)}}{"  ".join(values)}'
