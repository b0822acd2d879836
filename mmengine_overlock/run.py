"""Train and test by a configuration, with either toolbox."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmengine_overlock.amp import enable_amp
from mmengine_overlock.checkpoint import find_resumable
from mmengine_overlock.checkpoint_hook import LosslessCheckpointHook  # noqa: F401  (registered)
from mmengine_overlock.config import (
    as_list,
    draw_predictions,
    enable_auto_scale_lr,
    load_config,
    save_predictions,
    set_data_root,
    set_weights,
    use_tta,
)
from mmengine_overlock.data import check_data
from mmengine_overlock.data.samples import name_samples
from mmengine_overlock.hooks import BroadcastBuffersHook, WholeModelHook
from mmengine_overlock.launch import agreed, is_first, prepare_launch
from mmengine_overlock.nan import FiniteCheckpointHook, NonFiniteHook
from mmengine_overlock.own_data import find_folder, fit_training, use_own_data
from mmengine_overlock.resume import make_resumable
from mmengine_overlock.speed import TuneHook, compile_backbones, narrow_backbones, tune_for_training
from mmengine_overlock.stop import StopHook, shield_workers, tell_the_way_back
from mmengine_overlock.terminal import Terminal, calm
from mmengine_overlock.terminal_hook import TerminalHook
from mmengine_overlock.training_options import add_backend, average_weights, stop_early
from mmengine_overlock.work_dir import owned
from overlock import keep_freed_memory
from overlock.checkpoint import find_file
from overlock.utils.distributed import leave_group
from overlock.utils.errors import brief_mistakes


@brief_mistakes
def train(
    config: str | Path,
    *,
    work_dir: str | Path | None = None,
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    compile: bool = False,
    tensorboard: bool = False,
    wandb: bool = False,
    mlflow: bool = False,
    ema: bool = False,
    early_stop: int | None = None,
    data_root: str | Path | None = None,
    coco: str | Path | None = None,
    masks: str | Path | None = None,
    check: bool = True,
    weights: str | None = None,
    on_nan: str = 'stop',
    cfg_options: dict[str, Any] | None = None,
    launcher: str = 'none',
    verbose: bool = False,
) -> Runner:
    """Train a detector or segmenter.

    Args:
        config: File of the configuration.
        work_dir: Folder for logs and checkpoints; by default `work_dirs/<name of the configuration>`.
        resume: A checkpoint to continue from, or 'auto' for the last complete one in the work folder, if any.
        amp: Train in bfloat16 where the device has it, else in float16.
        auto_scale_lr: Scale the learning rate with the total batch size.
        compile: Compile the blocks of the backbone with torch.compile.
        tensorboard, wandb, mlflow: Log to TensorBoard, Weights & Biases or MLflow too.
        ema: Keep a running average of the weights, which is validated and saved, see `average_weights`.
        early_stop: End after so many validations in a row without a better score.
        data_root: Folder of the data, instead of the configuration's.
        coco: Folder of a data set of one's own in COCO's format, see `find_coco`; the heads get its classes, and the
            learning rate is scaled with the total batch size unless `cfg_options` set it.
        masks: Likewise a folder of images and label maps, see `find_masks`.
        check: Check the data before the run.
        weights: Weights of the backbone to start from, instead of the configuration's.
        on_nan: 'stop' the run where a loss or a gradient is not finite, or 'skip' the update.
        cfg_options: Settings by dotted name, over those of the configuration.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.
        verbose: Write all that goes to the log file to the terminal too, as mmengine does.

    Returns:
        The runner after training.

    Raises:
        UserError, CheckpointError: What the user gave cannot be used; one sentence says why.
        SystemExit: A signal stopped the training after a checkpoint was saved, see `StopHook`.
        KeyboardInterrupt: There was nothing to save, or no time to; the message tells what was saved before.
    """
    with ExitStack() as stack:
        terminal = stack.enter_context(calm(launcher, verbose))
        with agreed(launcher):
            cfg = load_config(config, cfg_options, work_dir, launcher)
            stack.enter_context(tell_the_way_back(cfg.work_dir))
            if is_first(launcher):
                stack.enter_context(owned(cfg.work_dir))
            if data_root is not None:
                set_data_root(cfg, data_root)
            if auto_scale_lr:
                enable_auto_scale_lr(cfg)
            if folder := find_folder(coco, masks, check):
                use_own_data(cfg, folder, cfg_options)
                fit_training(cfg, folder, cfg_options)
            if weights is not None:
                set_weights(cfg, weights)
            if amp:
                enable_amp(cfg)
            for name, wanted in (('tensorboard', tensorboard), ('wandb', wandb), ('mlflow', mlflow)):
                if wanted:
                    add_backend(cfg, name)
            if ema:
                average_weights(cfg)
            if early_stop is not None:
                stop_early(cfg, early_stop)
            _set_resume(cfg, resume)
            if check:
                check_data(cfg, 'train', 'val')
        runner = _build_runner(cfg, terminal, strict=cfg.resume)
        runner.register_hook(NonFiniteHook(on_nan))
        runner.register_hook(FiniteCheckpointHook())
        make_resumable(runner)
        stop = StopHook()
        runner.register_hook(stop)
        if cfg.resume:
            _skip_pretrained(runner)
        tune_for_training(runner.model)
        if compile:
            compile_backbones(runner.model)
        with stop.listening():
            runner.train()
        leave_group()
        return runner


@brief_mistakes
def test(
    config: str | Path,
    checkpoint: str,
    *,
    work_dir: str | Path | None = None,
    out: str | Path | None = None,
    show_dir: str | Path | None = None,
    show: bool = False,
    tta: bool = False,
    fast: bool = False,
    amp: bool = False,
    compile: bool = False,
    data_root: str | Path | None = None,
    coco: str | Path | None = None,
    masks: str | Path | None = None,
    check: bool = True,
    cfg_options: dict[str, Any] | None = None,
    launcher: str = 'none',
    verbose: bool = False,
) -> dict[str, float]:
    """Evaluate a trained detector or segmenter.

    Args:
        config: File of the configuration.
        checkpoint: The weights, by their published name, path or URL; they must fit the whole model.
        out: File (.pkl) for the predictions.
        show_dir: Folder for images with the predictions drawn beside the ground truth.
        show: Show these images in windows.
        tta: Merge the predictions for several views of each image.
        fast: Tune the model for inference, see `tune_for_inference`.
        amp: Run the backbone in bfloat16; with `fast` neck and heads too.
        work_dir, compile, data_root, coco, masks, check, cfg_options, launcher, verbose: See `train`.

    Returns:
        The metrics by name.

    Raises:
        UserError, CheckpointError: What the user gave cannot be used; one sentence says why.
    """
    with calm(launcher, verbose) as terminal:
        with agreed(launcher):
            cfg = load_config(config, cfg_options, work_dir, launcher)
            cfg.load_from, cfg.resume = _local(checkpoint), False
            if data_root is not None:
                set_data_root(cfg, data_root)
            if folder := find_folder(coco, masks, check):
                use_own_data(cfg, folder, cfg_options)
            if tta:
                use_tta(cfg)
            if show_dir is not None or show:
                draw_predictions(cfg, show_dir, show)
            if out is not None:
                save_predictions(cfg, out)
            if fast:
                # It would swap parameters with a model that is not tuned; the file holds the average as the weights.
                hooks = as_list(cfg.get('custom_hooks'))
                cfg.custom_hooks = [hook for hook in hooks if not str(hook['type']).endswith('EMAHook')]
            if check:
                check_data(cfg, 'test')
        runner = _build_runner(cfg, terminal, strict=True)
        if fast:
            runner.register_hook(TuneHook(amp))
        elif amp:
            narrow_backbones(runner.model)
        if compile:
            compile_backbones(runner.model)
        scores = runner.test()
        leave_group()
        return scores


def _local(checkpoint: str) -> str:
    """Return the file of a published name, path or URL; mmengine has readers of its own for other schemes."""
    schemes = '://' in checkpoint and not checkpoint.startswith(('http://', 'https://'))
    return checkpoint if schemes else str(find_file(checkpoint))


def _set_resume(cfg: Config, resume: str | None) -> None:
    """Write the checkpoint to continue from, if any, into the configuration."""
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    found = find_resumable(cfg.work_dir) if resume == 'auto' else resume
    if resume is not None and found is None:
        message = f'There is no checkpoint in {cfg.work_dir} to resume: training starts anew.'
        print_log(message, 'current', logging.WARNING)
    cfg.resume = found is not None
    start = found or cfg.get('load_from')
    cfg.load_from = start and _local(str(start))


def _build_runner(cfg: Config, terminal: Terminal | None, *, strict: bool) -> Runner:
    name_samples()
    if get_device() == 'cpu':
        keep_freed_memory()
    prepare_launch(cfg)
    kind = RUNNERS.get(cfg.get('runner_type', 'Runner'))
    runner = (terminal.calmed(kind) if terminal else kind).from_cfg(cfg)
    if terminal and terminal.shows_progress:
        runner.register_hook(TerminalHook(terminal))
    shield_workers(runner)
    if runner.distributed:
        runner.register_hook(BroadcastBuffersHook())
    if strict:
        runner.register_hook(WholeModelHook())
    return runner


def _skip_pretrained(runner: Runner) -> None:
    """Load no pretrained weights into a resumed run: its checkpoint holds them, and their URL may be out of reach."""
    for module in runner.model.modules():
        init_cfg = getattr(module, 'init_cfg', None)
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            module.init_cfg = None
