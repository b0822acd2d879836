"""Train a classifier."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn, random_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from imagenet_overlock import checkpoints
from imagenet_overlock.checkpoints import LAST
from imagenet_overlock.confusion import write_csv
from imagenet_overlock.data import seed_epoch, train_loader, val_loader
from imagenet_overlock.distributed import World, join_world
from imagenet_overlock.evaluate import evaluate
from imagenet_overlock.folder import Split, check_folder
from imagenet_overlock.model import Classifier, create_model, load_weights
from imagenet_overlock.recipe import Recipe
from overlock.layers.sync_norm import synchronize_on_cpus
from overlock.utils.errors import UserError
from overlock.utils.files import check_writable, whole_file
from overlock.utils.finite import UpdateGuard, non_finite

_logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    data_dir: str | os.PathLike,
    output: str | os.PathLike,
    resume: str | None = None,
    device: str | None = None,
    tensorboard: bool = False,
) -> list[dict[str, float]]:
    """Train a classifier and validate it after each epoch.

    `output` receives `last.pth` (all that resuming needs), `best.pth` (the weights of the best epoch, by the top-1
    accuracy of the averaged weights if there are any) and `summary.csv`.

    Args:
        recipe: The settings.
        data_dir: Image folder with the splits `train/` and `val/` or `validation/`.
        output: Folder to write.
        resume: Checkpoint to resume, or 'auto' for `last.pth` in `output`, if there is one.
        device: Device of torch; None for the GPU where there is one.
        tensorboard: Whether to write scalars for TensorBoard too.

    Returns:
        The figures of every epoch, as in `summary.csv`.

    Raises:
        UserError: If data, settings, weights or device cannot be used, or the loss is not finite.
    """
    output = Path(output)
    with join_world(device) as world:
        splits = world.together(lambda: check_folder(data_dir, recipe.total_batch(world.size)))
        last = world.together(lambda: checkpoints.find_checkpoint(resume, output))
        if len(set(world.gather((splits, last)))) > 1:
            raise UserError(
                f'The machines of this run do not find the same images in {data_dir} and the same checkpoint in '
                f'{output}; give folders that all of them share.'
            )
        world.together(lambda: check_writable(output / LAST))
        trainer = Trainer(recipe, *splits, output, world, from_start=last is None)
        if last is not None:
            trainer.resume(last)
        writer = None
        if tensorboard and world.is_first:
            from torch.utils.tensorboard import SummaryWriter  # here: its import takes long

            writer = SummaryWriter(output / 'tensorboard')
        try:
            return trainer.fit(writer)
        except KeyboardInterrupt:
            way = '; to go on, give the same command with --resume' if (output / LAST).exists() else ''
            raise KeyboardInterrupt(f'Interrupted: {trainer.kept}{way}.') from None


class Trainer:
    """A training run: its state and its loop.

    Only a run `from_start` loads the weights that the recipe starts from; a resumed run has its own.

    Raises:
        UserError: If the settings do not fit each other or the images, or the weights cannot be used.
    """

    def __init__(
        self, recipe: Recipe, train_split: Split, val_split: Split, output: Path, world: World, from_start: bool = True
    ) -> None:
        name = recipe.model.partition('.')[0]
        if name.endswith('_reparam'):
            raise UserError(f'{name} is folded for inference; train {name.removesuffix("_reparam")}.')
        self.recipe, self.classes, self.output, self.world = recipe, train_split.classes, output, world
        random_seed(recipe.seed)
        self.model = _build(recipe, len(self.classes), from_start).to(world.device)
        if world.is_distributed and recipe.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            if world.device.type == 'cpu':
                synchronize_on_cpus(self.model)
        self.loader = train_loader(recipe, train_split, world, self.model)
        self.val_loader = val_loader(
            val_split, world, self.model, recipe.batch_size, recipe.workers, recipe.img_size, recipe.crop_pct
        )
        self.mixup: Mixup | None = None
        self.loss: nn.Module = LabelSmoothingCrossEntropy(recipe.smoothing)
        if recipe.mixes:
            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=len(self.classes)
            )
            self.loss = SoftTargetCrossEntropy()
        self.updates = len(self.loader) // recipe.grad_accum_steps
        self.optimizer = _create_optimizer(recipe, world, self.model)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.autocast is torch.float16)
        self.guard = UpdateGuard(self.optimizer, self.model, recipe.on_nan, self.scaler.is_enabled())
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer,
            'cosine',
            recipe.epochs,
            warmup_epochs=recipe.warmup_epochs,  # type: ignore[arg-type]  # takes fractions too
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            cooldown_epochs=recipe.cooldown_epochs,
            step_on_epochs=not recipe.sched_on_updates,
            updates_per_epoch=self.updates,
        )
        self.ema = ModelEmaV3(self.model, recipe.model_ema_decay) if recipe.model_ema else None
        self.parallel: nn.Module = self.model
        if world.is_distributed:
            self.parallel = DistributedDataParallel(
                self.model, [world.device] if world.device.type == 'cuda' else None, broadcast_buffers=False
            )
        self.epoch = self.done = 0
        self.history: list[dict[str, float]] = []
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        _logger.info(
            f'{recipe.model}, {parameters / 1e6:.2f} M parameters, {len(self.classes)} classes, {train_split.images} '
            f'training and {val_split.images} validation images of {recipe.img_size} pixels; {world.size} process(es) '
            f'on {world.device.type}, {recipe.total_batch(world.size)} images in an update, {self.updates} updates in '
            f'an epoch, learning rate {recipe.learning_rate(world.size):.2e}'
        )

    def resume(self, path: Path) -> None:
        """Restore the state of a checkpoint that has this model and these classes."""
        content = checkpoints.read_checkpoint(path)
        checkpoints.check_resumable(content, path, self.recipe, self.classes, self.world.size)
        self.model.load_state_dict(content['state_dict'])
        if self.ema:
            self.ema.module.load_state_dict(content['state_dict_ema'])
        self.optimizer.load_state_dict(content['optimizer'])
        if content.get('amp_scaler'):
            self.scaler.load_state_dict(content['amp_scaler'])
        self.history = content['history']
        self.epoch = content['epoch'] + 1
        self.done = self.epoch * self.updates
        self._schedule()
        _logger.info('resumed from %s after epoch %d of %d', path, self.epoch, self.epochs)

    def fit(self, writer: Any = None) -> list[dict[str, float]]:
        """Train from the current epoch to the last; return the figures of all, and write them for TensorBoard."""
        self.begin, self.first = time.perf_counter(), self.done
        while self.epoch < self.epochs:
            start = time.perf_counter()
            row = {'epoch': self.epoch, **self._train_epoch(), 'lr': self._lr, **self._validate()}
            row['seconds'] = time.perf_counter() - start
            self.history.append(row)
            self.world.together(self._save)
            figures = ', '.join(f'{name} {value:.4g}' for name, value in row.items() if name != 'epoch')
            _logger.info('%s: %s, %s', self._title, figures, self._eta)
            if writer:
                for name, value in row.items():
                    writer.add_scalar(name.replace('_', '/', 1), value, self.epoch + 1)
                writer.flush()
            self.epoch += 1
            self._schedule()
        return self.history

    def _schedule(self) -> None:
        """Set the learning rate for the updates and epochs done."""
        self.scheduler.step_update(self.done)
        self.scheduler.step(self.epoch)

    @property
    def _lr(self) -> float:
        """Return the highest learning rate of all layers."""
        return max(group['lr'] for group in self.optimizer.param_groups)

    @property
    def _title(self) -> str:
        return f'epoch {self.epoch + 1}/{self.epochs}'

    @property
    def _eta(self) -> str:
        """Return the remaining time at the pace so far."""
        left = (self.epochs * self.updates - self.done) / (self.done - self.first)
        return f'ETA {timedelta(seconds=round((time.perf_counter() - self.begin) * left))}'

    def _train_epoch(self) -> dict[str, float]:
        """Return the mean losses and the rate of an epoch."""
        recipe, world = self.recipe, self.world
        seed_epoch(recipe.seed, self.epoch, world.rank)
        if world.is_distributed:
            self.loader.sampler.set_epoch(self.epoch)
        self.parallel.train()
        self.guard.keep()
        batches = iter(self.loader)
        sums = recent = torch.zeros(4, dtype=torch.float64, device=world.device)
        start, on_terminal = time.perf_counter(), sys.stderr.isatty()
        with tqdm(
            total=self.updates,
            desc=self._title,
            unit='update',
            leave=False,
            disable=not (world.is_first and on_terminal),
        ) as bar:
            for update in range(1, self.updates + 1):
                recent = recent + self._update(batches)
                bar.update()
                if update % recipe.log_interval == 0 or update == self.updates:
                    recent = world.sum(recent)
                    mean, sums, recent = recent[0] / recent[3], sums + recent, torch.zeros_like(recent)
                    rate = update * recipe.total_batch(world.size) / (time.perf_counter() - start)
                    status = f'loss {mean:.3f}, lr {self._lr:.2e}, {rate:.1f} images/s, {self._eta}'
                    bar.set_postfix_str(status)
                    if not on_terminal:
                        _logger.info('%s, update %d/%d: %s', self._title, update, self.updates, status)
        if world.is_distributed and not recipe.sync_bn:
            for model in (self.model, *([self.ema.module] if self.ema else [])):
                distribute_bn(model, world.size, reduce=True)
        loss, main, aux = (sums[:3] / sums[3]).tolist()
        heads = {'train_loss_main': main, 'train_loss_aux': aux} if recipe.aux_weight else {}
        return {'train_loss': loss, **heads, 'train_images_per_second': rate}

    def _update(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Run one update.

        Returns:
            (4,), the losses of this process, total, main and auxiliary, and 1; zeros if they are not finite.
        """
        recipe, world, parallel = self.recipe, self.world, self.parallel
        losses = torch.zeros(3, dtype=torch.float64, device=world.device)
        for step in range(recipe.grad_accum_steps):
            images, targets = next(batches)
            if self.mixup:
                images, targets = self.mixup(images, targets)
            last = step == recipe.grad_accum_steps - 1
            with nullcontext() if last or not isinstance(parallel, DistributedDataParallel) else parallel.no_sync():
                with torch.autocast(world.device.type, recipe.autocast, enabled=recipe.amp):
                    logits = parallel(images)
                if not isinstance(logits, dict):
                    logits = {'main': logits}
                main = self.loss(logits['main'].float(), targets)
                aux = self.loss(logits['aux'].float(), targets) if 'aux' in logits else torch.zeros_like(main)
                loss = main + recipe.aux_weight * aux
                self.guard.watch(loss)
                self.scaler.scale(loss / recipe.grad_accum_steps).backward()
            losses += torch.stack([loss, main, aux]).detach().double() / recipe.grad_accum_steps
        if recipe.clip_grad:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.done += 1
        self.scheduler.step_update(self.done)
        made = self.guard.made()
        if not made:
            self._tell_left_out(losses)
            if not losses.isfinite().all():
                return losses.new_zeros(4)
        # As timm's script, also where scaled gradients overflowed: the statistics are new.
        if self.ema and (made or self.scaler.is_enabled()):
            self.ema.update(self.model)
        return torch.cat([losses, losses.new_ones(1)])

    def _validate(self) -> dict[str, float]:
        """Return the figures of the weights as `val_*`, and of their average as `val_ema_*`."""
        models = {'val_': self.model, **({'val_ema_': self.ema.module} if self.ema else {})}
        row: dict[str, float] = {}
        for prefix, model in models.items():
            figures, _ = evaluate(model, self.val_loader, self.world, self.recipe.autocast)
            row |= {f'{prefix}{name}': value for name, value in figures.items() if not name.startswith('images')}
        if not isfinite(row['val_loss']):
            raise self._diverged(f'The loss of the validation became {row["val_loss"]}')
        return row

    def _tell_left_out(self, losses: Tensor) -> None:
        """Log that an update was left out, in all processes, or end the run."""
        named = zip(
            ('loss', 'main', 'auxiliary'), (self.world.sum(losses.clone()) / self.world.size).tolist(), strict=True
        )
        what = (
            f'The loss or a gradient of update {(self.done - 1) % self.updates + 1} is not finite '
            f'({", ".join(f"{name} {value:.4g}" for name, value in named)})'
        )
        if self.guard.must_stop:
            raise self._diverged(what)
        _logger.warning('%s: %s: it was left out, %d so far', self._title, what, self.guard.skipped)

    @property
    def kept(self) -> str:
        """Return what the output folder holds of the run."""
        last = self.output / LAST
        return f'{last} holds the state of epoch {self.epoch}' if last.exists() else 'there is no checkpoint yet'

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f'{what} in epoch {self.epoch + 1}; {self.kept}. Lower --lr-base, raise --warmup-epochs'
            f'{", take --no-amp" if self.recipe.amp else ""} or --on-nan skip, which leaves out such updates.'
        )

    def _save(self) -> None:
        if not self.world.is_first:
            return
        weights = {'': self.model, **({' of the average': self.ema.module} if self.ema else {})}
        for kind, model in weights.items():
            if found := non_finite(model.state_dict()):
                raise self._diverged(f'{len(found)} tensors{kind} (first {found[0]}) are not finite')
        metric = 'val_ema_top1' if self.ema else 'val_top1'
        best = max(self.history, key=lambda row: row[metric])
        content = dict(
            epoch=self.epoch,
            arch=self.recipe.model,
            state_dict=self.model.state_dict(),
            classes=list(self.classes),
            args=checkpoints.settings(self.recipe),
            processes=self.world.size,
            metric=best[metric],
            history=self.history,
        )
        if self.ema:
            content['state_dict_ema'] = self.ema.module.state_dict()
        if best is self.history[-1]:
            _write(self.output / checkpoints.BEST, content)
        write_csv(self.output / 'summary.csv', [list(best), *(list(row.values()) for row in self.history)])
        # Last, so that a run that is cut off before it writes the others again.
        _write(
            self.output / LAST,
            {**content, 'optimizer': self.optimizer.state_dict(), 'amp_scaler': self.scaler.state_dict()},
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as file:
        torch.save(content, file)


def _build(recipe: Recipe, num_classes: int, from_start: bool) -> Classifier:
    pretrained = recipe.pretrained and from_start
    model = create_model(recipe.model, num_classes, recipe.aux_weight > 0, recipe.drop_path, pretrained)
    if recipe.initial_checkpoint and from_start:
        load_weights(model, *checkpoints.starting_weights(recipe.initial_checkpoint))
    model.set_grad_checkpointing(recipe.grad_checkpointing and (recipe.ckpt_stg or True))
    return model


def _create_optimizer(recipe: Recipe, world: World, model: Classifier) -> torch.optim.Optimizer:
    lr = recipe.learning_rate(world.size)
    if lr < recipe.min_lr:
        raise UserError(
            f'The learning rate for {recipe.total_batch(world.size)} images in an update is {lr:.2e}, '
            f'below the {recipe.min_lr:.2e} that the cosine ends at; lower --min-lr.'
        )
    try:
        return create_optimizer_v2(model, recipe.opt, lr, recipe.weight_decay, layer_decay=recipe.layer_decay)
    # timm asserts the name before 1.0.12, and raises after.
    except (ValueError, AssertionError) as error:
        raise UserError(f'timm cannot build the optimizer {recipe.opt} ({error}); take adamw.') from None
