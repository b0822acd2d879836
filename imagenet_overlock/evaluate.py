"""Accuracy of a classifier on a split, exact however many processes share the work."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from imagenet_overlock.distributed import World
from imagenet_overlock.model import both_logits
from overlock.utils.errors import UserError

T = TypeVar('T')


@dataclass(frozen=True)
class Metrics:
    """The figures of a validation.

    Attributes:
        images: Number of images.
        loss: Mean cross-entropy of the main head, in nats.
        top1: Images whose class the main head puts first, in percent.
        top5: Images whose class the main head puts among its first five, in percent.
        aux_top1: As `top1`, of the auxiliary head; None without one.
        aux_top5: As `top5`, of the auxiliary head; None without one.
        confusion: (C, C), int64; how many images of class i the main head takes for class j.
        images_per_second: Of all processes together, without each one's first batch; None where there is no other.
    """

    images: int
    loss: float
    top1: float
    top5: float
    aux_top1: float | None
    aux_top5: float | None
    confusion: Tensor
    images_per_second: float | None

    def scalars(self) -> dict[str, float]:
        """Return the figures by name, without those of a head that is not there."""
        named = {name: getattr(self, name) for name in ('loss', 'top1', 'top5', 'aux_top1', 'aux_top5')}
        return {name: value for name, value in named.items() if value is not None}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Collection[tuple[Tensor, Tensor]], world: World, amp: bool = False) -> Metrics:
    """Evaluate this process's share of a split and sum up over all processes.

    Args:
        model: Classifier; it is left in evaluation mode.
        batches: Images (B, 3, H, W) and classes (B,) on the device of `world`.
        world: The processes that each have a share.
        amp: Whether to run in bfloat16 autocast.

    Raises:
        UserError: If an image cannot be decoded; in all processes.
    """
    sums, rate = world.together(lambda: _count(model.eval(), batches, world, amp))
    sums = {name: world.sum(value).double().cpu() for name, value in sums.items()}
    images = max(int(sums['confusion'].sum()), 1)
    percent = {head: (100 * sums[head] / images).tolist() for head in ('main', 'aux') if head in sums}
    return Metrics(
        int(sums['confusion'].sum()),
        sums['loss'].item() / images,
        *percent['main'],
        *percent.get('aux', (None, None)),
        sums['confusion'].long(),
        sum(world.gather(rate)) or None,
    )


def _count(
    model: nn.Module, batches: Collection[tuple[Tensor, Tensor]], world: World, amp: bool
) -> tuple[dict[str, Tensor], float]:
    """Return sums over the images of this process, and its images per second."""
    classes = model.num_classes
    heads = ('main', 'aux') if model.aux_head is not None else ('main',)
    sums = {head: torch.zeros(2, dtype=torch.int64, device=world.device) for head in heads}
    sums['confusion'] = torch.zeros(classes, classes, dtype=torch.int64, device=world.device)
    sums['loss'] = torch.zeros((), dtype=torch.float64, device=world.device)
    timed, start = 0, None
    shown = world.is_first and sys.stderr.isatty()
    for images, targets in tqdm(_plain_errors(batches), 'validation', len(batches), leave=False, disable=not shown):
        with torch.autocast(world.device.type, torch.bfloat16, enabled=amp):
            logits = both_logits(model, images)
        for head in heads:
            sums[head] += count_hits(logits[head], targets)
        pairs = targets * classes + logits['main'].argmax(1)
        sums['confusion'] += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        sums['loss'] += F.cross_entropy(logits['main'].float(), targets, reduction='none').double().sum()
        # `item` waits for the device. The first batch, which waits for data and kernels, is not timed.
        if start is None:
            sums['loss'].item()
            start = time.perf_counter()
        else:
            timed += len(targets)
    sums['loss'].item()
    return sums, timed / (time.perf_counter() - start) if timed else 0.0


def _plain_errors(batches: Iterable[T]) -> Iterator[T]:
    """Yield the batches; a UserError of a loader's worker loses the traceback that stands before the sentence."""
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).strip().rpartition('\n')[2].rpartition('UserError: ')[2]) from error


def count_hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Count the targets (B,) that are first, and among the first five, by their logits (B, C): (2,), int64."""
    found = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    return torch.stack([found[:, 0].sum(), found.sum()])
