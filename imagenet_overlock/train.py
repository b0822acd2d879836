"""Training a classifier."""

from __future__ import annotations

import csv
import io
import logging
import os
import time
from contextlib import nullcontext
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn, random_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from imagenet_overlock.checkpoints import (
    BEST,
    LAST,
    check_resumable,
    find_checkpoint,
    read_checkpoint,
    settings,
    starting_weights,
    write_checkpoint,
)
from imagenet_overlock.data import create_mixup, seed_epoch, train_loader, val_loader
from imagenet_overlock.distributed import World, join_world
from imagenet_overlock.evaluate import evaluate
from imagenet_overlock.folder import ImageFolder, check_folder
from imagenet_overlock.model import create_model, load_weights
from imagenet_overlock.progress import EpochProgress, Eta, epoch_line
from imagenet_overlock.recipe import Recipe
from overlock.utils.errors import UserError
from overlock.utils.files import whole_file

_logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    data_dir: str | os.PathLike,
    output: str | os.PathLike,
    resume: str | None = None,
    device: str | None = None,
    tensorboard: bool = False,
) -> list[dict[str, float]]:
    """Trains a classifier and validates it after each epoch.

    `output` receives `last.pth` (all that is needed to go on), `best.pth` (the weights of the best epoch, by the top-1
    accuracy of the averaged weights where there are such) and `summary.csv`.

    Args:
        recipe: The settings.
        data_dir: Image folder with the splits `train/` and `val/` or `validation/`.
        output: Folder to write.
        resume: Checkpoint to go on from, or 'auto' for `last.pth` in `output`, if there is one.
        device: Device of torch; None for the GPU where there is one.
        tensorboard: Whether to write scalars for TensorBoard too.

    Returns:
        The figures of every epoch, as in `summary.csv`.

    Raises:
        UserError: If data, settings, weights or device cannot be used, or the loss is not finite.
    """
    output = Path(output)
    with join_world(device) as world:
        batch = recipe.total_batch(world.size)
        folder = world.once_per_machine(lambda: check_folder(data_dir, batch))
        contents = [(split.classes, split.images) for split in (folder.train, folder.val)]
        if any(other != contents for other in world.gather(contents)):
            raise UserError(
                f'The machines of this run do not find the same classes and numbers of images in '
                f'{data_dir}; give a folder that is the same for all.'
            )
        last = world.once_per_machine(lambda: find_checkpoint(resume, output))
        if len(set(world.gather(last))) > 1:
            raise UserError(f'Not every machine sees the same checkpoint in {output}; take a folder that all share.')
        trainer = Trainer(recipe, folder, output, world, from_start=last is None)
        if last is not None:
            trainer.resume(last)
        return trainer.fit(_tensorboard_writer(output, world) if tensorboard else None)


class Trainer:
    """A training run: what it needs to go on, and its loop.

    Args:
        recipe: The settings.
        folder: The images, checked.
        output: Folder to write.
        world: The processes of the run.
        from_start: Whether to load the weights that the recipe starts from: a run that is resumed has its own.

    Raises:
        UserError: If the settings do not fit each other or the images, or the weights cannot be used.
    """

    def __init__(
        self, recipe: Recipe, folder: ImageFolder, output: Path, world: World, from_start: bool = True
    ) -> None:
        classes = folder.train.classes
        if recipe.model.endswith('_reparam'):
            raise UserError(f'{recipe.model} is folded for inference; train {recipe.model.removesuffix("_reparam")}.')
        self.recipe, self.classes, self.output, self.world = recipe, classes, output, world
        random_seed(recipe.seed)
        self.model = _build(recipe, len(classes), world, from_start)
        self.loader = train_loader(recipe, folder.train, world, self.model)
        self.val_loader = val_loader(
            folder.val, world, self.model, recipe.batch_size, recipe.workers, recipe.img_size, recipe.crop_pct
        )
        self.val_images = folder.val.images
        self.mixup = create_mixup(recipe, len(classes))
        self.loss = SoftTargetCrossEntropy() if self.mixup else LabelSmoothingCrossEntropy(recipe.smoothing)
        self.updates = len(self.loader) // recipe.grad_accum_steps
        self.optimizer = _create_optimizer(recipe, world, self.model)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            'cosine',
            recipe.epochs,
            warmup_epochs=recipe.warmup_epochs,
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.updates,
        )
        self.ema = ModelEmaV3(self.model, recipe.model_ema_decay) if recipe.model_ema else None
        self.parallel: nn.Module = self.model
        if world.is_distributed:
            # Each process has its own running statistics in an epoch, and their mean after it.
            self.parallel = DistributedDataParallel(
                self.model, [world.device] if world.device.type == 'cuda' else None, broadcast_buffers=False
            )
        self.epoch = self.done = 0
        self.history: list[dict[str, float]] = []

    def resume(self, path: Path) -> None:
        """Takes up the state of a checkpoint.

        Raises:
            CheckpointError: If it is not of this model and these classes.
        """
        content = read_checkpoint(path)
        check_resumable(content, path, self.recipe, self.classes, self.world.size)
        self.model.load_state_dict(content['state_dict'])
        if self.ema:
            self.ema.module.load_state_dict(content['state_dict_ema'])
        self.optimizer.load_state_dict(content['optimizer'])
        self.history = content['history']
        self.epoch = content['epoch'] + 1
        self.done = self.epoch * self.updates
        self.scheduler.step_update(self.done)
        _logger.info('resumed from %s after epoch %d of %d', path, self.epoch, self.recipe.epochs)

    def fit(self, writer: Any = None) -> list[dict[str, float]]:
        """Trains from the current epoch to the last.

        Args:
            writer: A SummaryWriter of TensorBoard.

        Returns:
            The figures of every epoch.

        Raises:
            UserError: If the loss is not finite.
        """
        self._log_start()
        left = self.recipe.epochs - self.epoch
        eta = Eta(left * self.updates, left)
        while self.epoch < self.recipe.epochs:
            start = time.perf_counter()
            row = {'epoch': self.epoch}
            row |= {f'train_{name}': value for name, value in self._train_epoch(eta).items()}
            row['lr'] = self._lr
            begin = time.perf_counter()
            row |= self._validate()
            eta.add('validation', time.perf_counter() - begin)
            row['seconds'] = time.perf_counter() - start
            self.history.append(row)
            self._save()
            _logger.info('%s', epoch_line(row, self.recipe.epochs, eta))
            if writer:
                for name, value in row.items():
                    writer.add_scalar(name.replace('_', '/', 1), value, self.epoch + 1)
                writer.flush()
            self.epoch += 1
        return self.history

    @property
    def _lr(self) -> float:
        """The learning rate of the layers that have the highest."""
        return max(group['lr'] for group in self.optimizer.param_groups)

    def _train_epoch(self, eta: Eta) -> dict[str, float]:
        """Mean losses and the rate of an epoch."""
        recipe, world = self.recipe, self.world
        seed_epoch(recipe.seed, self.epoch, world.rank)
        if world.is_distributed:
            self.loader.sampler.set_epoch(self.epoch)
        self.parallel.train()
        batches = iter(self.loader)
        sums = recent = torch.zeros(3, dtype=torch.float64, device=world.device)
        progress = EpochProgress(
            f'epoch {self.epoch + 1}/{recipe.epochs}', self.updates, recipe.total_batch(world.size), eta, world.is_first
        )
        since = 0
        for update in progress:
            recent = recent + self._update(batches)
            since += 1
            if update % recipe.log_interval == 0 or update == self.updates:
                mean = world.sum(recent.clone()) / world.size / since
                self._check_finite(mean[0].item())
                progress.tell(update, mean[0].item(), self._lr)
                sums, recent, since = sums + mean * since, torch.zeros_like(recent), 0
        if world.is_distributed:
            for model in (self.model, *([self.ema.module] if self.ema else [])):
                distribute_bn(model, world.size, reduce=True)
        loss, main, aux = (sums / self.updates).tolist()
        heads = {'loss_main': main, 'loss_aux': aux} if recipe.aux_weight else {}
        return {'loss': loss, **heads, 'images_per_second': progress.rate}

    def _update(self, batches: Any) -> Tensor:
        """One update; the losses of this process: total, main and auxiliary, (3,)."""
        recipe, world = self.recipe, self.world
        losses = torch.zeros(3, dtype=torch.float64, device=world.device)
        for step in range(recipe.grad_accum_steps):
            images, targets = next(batches)
            if self.mixup:
                images, targets = self.mixup(images, targets)
            waits = world.is_distributed and step < recipe.grad_accum_steps - 1
            with self.parallel.no_sync() if waits else nullcontext():
                with torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.amp):
                    logits = self.parallel(images)
                main, aux = self._head_losses(logits, targets)
                loss = main + recipe.aux_weight * aux
                (loss / recipe.grad_accum_steps).backward()
            losses += torch.stack([loss, main, aux]).detach().double() / recipe.grad_accum_steps
        if recipe.clip_grad:
            dispatch_clip_grad(self.model.parameters(), recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        self.scheduler.step_update(self.done)
        if self.ema:
            self.ema.update(self.model)
        return losses

    def _head_losses(self, logits: Tensor | dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(logits, dict):
            return tuple(self.loss(logits[head].float(), targets) for head in ('main', 'aux'))
        main = self.loss(logits.float(), targets)
        return main, torch.zeros_like(main)

    def _validate(self) -> dict[str, float]:
        """Figures of the weights, and of their average as `ema_*`."""
        models = {'': self.model, **({'ema_': self.ema.module} if self.ema else {})}
        row = {}
        for prefix, model in models.items():
            metrics = evaluate(model, self.val_loader, self.world, self.recipe.amp)
            row |= {f'val_{prefix}{name}': value for name, value in metrics.scalars().items()}
        self._check_finite(row['val_loss'])
        return row

    def _check_finite(self, loss: float) -> None:
        """All processes see the same loss, so all of them stop."""
        if isfinite(loss):
            return
        last = self.output / LAST
        kept = f'{last} holds the state of epoch {self.epoch}' if last.exists() else 'there is no checkpoint yet'
        raise UserError(
            f'The loss became {loss} in epoch {self.epoch + 1}; {kept}. Lower --lr-base, raise '
            f'--warmup-epochs{", or leave out --amp" if self.recipe.amp else ""}.'
        )

    def _save(self) -> None:
        if not self.world.is_first:
            return
        metric = 'val_ema_top1' if self.ema else 'val_top1'
        best = max(self.history, key=lambda row: row[metric])
        content = dict(
            epoch=self.epoch,
            arch=self.recipe.model,
            state_dict=self.model.state_dict(),
            classes=list(self.classes),
            args=settings(self.recipe),
            processes=self.world.size,
            metric=best[metric],
            history=self.history,
        )
        if self.ema:
            content['state_dict_ema'] = self.ema.module.state_dict()
        if best is self.history[-1]:
            write_checkpoint(self.output / BEST, content)
        write_summary(self.output / 'summary.csv', self.history)
        # Last, so that a run that is cut off before it writes the others again.
        write_checkpoint(self.output / LAST, {**content, 'optimizer': self.optimizer.state_dict()})

    def _log_start(self) -> None:
        recipe, world = self.recipe, self.world
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        _logger.info(
            '%s, %.2f M parameters, %d classes, %d training and %d validation images at %dx%d; %d process%s on %s, '
            '%d images in an update, %d updates in an epoch, learning rate %.2e',
            recipe.model,
            parameters / 1e6,
            len(self.classes),
            len(self.loader.dataset),
            self.val_images,
            recipe.img_size,
            recipe.img_size,
            world.size,
            '' if world.size == 1 else 'es',
            world.device.type,
            recipe.total_batch(world.size),
            self.updates,
            recipe.learning_rate(world.size),
        )


def write_summary(path: Path, history: list[dict[str, float]]) -> None:
    """Writes the figures of every epoch as a table, whole or not at all."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(history[-1]), lineterminator='\n')
    table.writeheader()
    table.writerows(history)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


def _build(recipe: Recipe, num_classes: int, world: World, from_start: bool) -> nn.Module:
    """The model on its device."""
    model = create_model(
        recipe.model, num_classes, recipe.aux_weight > 0, recipe.drop_path, recipe.pretrained and from_start
    )
    if recipe.initial_checkpoint and from_start:
        load_weights(model, *starting_weights(recipe.initial_checkpoint))
    model.set_grad_checkpointing(recipe.grad_checkpointing)
    return model.to(world.device)


def _create_optimizer(recipe: Recipe, world: World, model: nn.Module) -> torch.optim.Optimizer:
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
        raise UserError(f'timm cannot build the optimizer {recipe.opt} ({error}); take adamw.') from error


def _tensorboard_writer(output: Path, world: World) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            '--tensorboard needs the package tensorboard; install it with `pip install tensorboard`.'
        ) from error
    return SummaryWriter(str(output / 'tensorboard')) if world.is_first else None
