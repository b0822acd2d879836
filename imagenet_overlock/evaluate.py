"""Accuracy of a classifier on a split, exact however many processes share the work."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from imagenet_overlock.distributed import World
from imagenet_overlock.model import both_logits
from overlock.utils.errors import UserError


@dataclass(frozen=True)
class Metrics:
    """What a validation came to.

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
        """The figures by name, without what the model has no head for."""
        named = dict(loss=self.loss, top1=self.top1, top5=self.top5, aux_top1=self.aux_top1, aux_top5=self.aux_top5)
        return {name: value for name, value in named.items() if value is not None}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Collection[tuple[Tensor, Tensor]], world: World, amp: bool = False) -> Metrics:
    """Evaluates this process's share of a split and sums up over all processes.

    Args:
        model: Classifier; it is left in evaluation mode.
        batches: Images (B, 3, H, W) and classes (B,) on the device of `world`.
        world: The processes that each have a share.
        amp: Whether to run in bfloat16 autocast.

    Raises:
        UserError: If an image cannot be decoded; in all processes.
    """
    model.eval()
    classes = model.num_classes
    heads = ('main', 'aux') if model.aux_head is not None else ('main',)
    hits = {head: torch.zeros(2, dtype=torch.int64, device=world.device) for head in heads}
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=world.device)
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    timer = _Timer(world.device)
    for images, targets in tqdm(
        _shared(batches, world),
        'validation',
        leave=False,
        unit='batch',
        dynamic_ncols=True,
        total=len(batches),
        disable=not (world.is_first and sys.stderr.isatty()),
    ):
        with torch.autocast(world.device.type, torch.bfloat16, enabled=amp):
            logits = both_logits(model, images)
        loss += F.cross_entropy(logits['main'].float(), targets, reduction='none').double().sum()
        ranked = {head: first_classes(logits[head]) for head in heads}
        for head in heads:
            hits[head] += count_hits(ranked[head], targets)
        confusion += torch.bincount(targets * classes + ranked['main'][:, 0], minlength=len(confusion))
        timer.count(len(targets))
    rate = world.sum(torch.tensor(timer.rate(), dtype=torch.float64, device=world.device)).item()
    world.sum(confusion)
    world.sum(loss)
    total = int(confusion.sum())
    percent = {head: (100 * world.sum(hits[head]).double() / max(total, 1)).tolist() for head in heads}
    return Metrics(
        total,
        loss.item() / max(total, 1),
        *percent['main'],
        *percent.get('aux', (None, None)),
        confusion.view(classes, classes).cpu(),
        rate or None,
    )


def first_classes(logits: Tensor) -> Tensor:
    """The five classes, or all where there are fewer, with the highest of the logits (B, C): (B, 5), int64."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def count_hits(ranked: Tensor, targets: Tensor) -> Tensor:
    """How many targets (B,) are first, and anywhere, among the classes (B, 5): (2,), int64."""
    found = ranked == targets[:, None]
    return torch.stack([found[:, 0].sum(), found.sum()])


def _shared(batches: Collection[tuple[Tensor, Tensor]], world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; a UserError that ends those of one process ends all."""
    sentence = ''
    try:
        yield from batches
    except UserError as error:
        # A loader puts the traceback of its worker before the sentence.
        sentence = str(error).strip().rpartition('\n')[2].removeprefix('overlock.utils.errors.UserError: ')
    world.raise_together(sentence)


class _Timer:
    """Images per second, the first batch left out: it waits for the data and for kernels to be chosen."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.images = -1
        self.start = 0.0

    def count(self, images: int) -> None:
        if self.images < 0:
            self.images = 0
            self.start = self._now()
        else:
            self.images += images

    def rate(self) -> float:
        return self.images / (self._now() - self.start) if self.images > 0 else 0.0

    def _now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
