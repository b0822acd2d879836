"""Measure the exact accuracy of a classifier on a split that any number of processes share."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from imagenet_overlock.distributed import World
from imagenet_overlock.model import Classifier, both_logits
from overlock.utils.errors import UserError

T = TypeVar('T')


@torch.no_grad()
def evaluate(
    model: Classifier, batches: PrefetchLoader, world: World, autocast: torch.dtype | None = None
) -> tuple[dict[str, float], Tensor]:
    """Evaluate this process's share of a split and sum up over all processes.

    Args:
        model: Classifier; it is left in evaluation mode.
        batches: Images (B, 3, H, W) and classes (B,) on the device of `world`.
        world: The processes that each have a share.
        autocast: The dtype of autocast; None for none.

    Returns:
        Figures by name: `images`, how many; `loss`, mean cross-entropy of the main head in nats; `top1` and `top5`,
        images whose class the main head puts first, and among its first five, in percent; `aux_top1` and `aux_top5`,
        likewise, if there is an auxiliary head; `images_per_second` of all processes, if any had a second batch.
        How many images of class i the main head takes for class j, (C, C), int64.

    Raises:
        UserError: If an image cannot be decoded; in all processes.
    """
    sums, rate = world.together(lambda: _count(model.eval(), batches, world, autocast))
    sums = {name: world.sum(value).cpu() for name, value in sums.items()}
    images = int(sums['confusion'].sum())
    figures = {'images': images, 'loss': sums['loss'].item() / max(images, 1)}
    for head, prefix in (('main', ''), ('aux', 'aux_')):
        if head in sums:
            top1, top5 = (100 * sums[head].double() / max(images, 1)).tolist()
            figures |= {f'{prefix}top1': top1, f'{prefix}top5': top5}
    rate = sum(world.gather(rate))
    if rate:
        figures['images_per_second'] = rate
    return figures, sums['confusion']


def _count(
    model: Classifier, batches: PrefetchLoader, world: World, autocast: torch.dtype | None
) -> tuple[dict[str, Tensor], float]:
    """Return sums over the images of this process, and its images per second."""
    classes = model.num_classes
    heads = ('main', 'aux') if model.aux_head is not None else ('main',)
    sums = {head: torch.zeros(2, dtype=torch.int64, device=world.device) for head in heads}
    sums['confusion'] = torch.zeros(classes, classes, dtype=torch.int64, device=world.device)
    sums['loss'] = torch.zeros((), dtype=torch.float64, device=world.device)
    timed, start = 0, 0.0
    shown = world.is_first and sys.stderr.isatty()
    for images, targets in tqdm(_plain_errors(batches), 'validation', len(batches), leave=False, disable=not shown):
        with torch.autocast(world.device.type, autocast, enabled=autocast is not None):
            logits = both_logits(model, images)
        for head in heads:
            sums[head] += count_hits(logits[head], targets)
        pairs = targets * classes + logits['main'].argmax(1)
        sums['confusion'] += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        sums['loss'] += F.cross_entropy(logits['main'].float(), targets, reduction='none').double().sum()
        # `item` waits for the device. The first batch, which waits for data and kernels, is not timed.
        if not start:
            sums['loss'].item()
            start = time.perf_counter()
        else:
            timed += len(targets)
    sums['loss'].item()
    return sums, timed / (time.perf_counter() - start) if timed else 0.0


def _plain_errors(batches: Iterable[T]) -> Iterator[T]:
    """Yield the batches; strip the traceback from the message of a UserError that a loader's worker raised."""
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).strip().rpartition('\n')[2].rpartition('UserError: ')[2]) from None


def count_hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Count the targets (B,) that are first, and among the first five, by their logits (B, C): (2,), int64."""
    found = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    return torch.stack([found[:, 0].sum(), found.sum()])
