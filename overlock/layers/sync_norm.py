"""BatchNorm with the statistics of all processes of a run, on CPUs."""

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed, nn

from overlock.layers.fold import BatchNorm

_agreed: WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = WeakKeyDictionary()


class CPUSyncBatchNorm(BatchNorm):
    """`torch.nn.SyncBatchNorm` for CPUs, where PyTorch has none; state dicts are the same.

    It is not a subclass of that: DistributedDataParallel refuses those on CPUs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, ...) to the same shape; in training, normalize by the statistics of all processes."""
        if not (self.training and is_shared()):
            return super().forward(x)
        axes = [0, *range(2, x.ndim)]
        shape = (1, -1, *[1] * (x.ndim - 2))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = sum_over_processes(torch.cat([wide.sum(axes), wide.new_full((1,), x.numel() / x.shape[1])]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centered = wide - mean.view(shape)
        squares = sum_over_processes(centered.square().sum(axes))
        y = centered * (squares / count + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        track(self, mean.detach(), squares.detach() / (count - 1))
        return y.to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        """Take maps of any number of axes."""


@torch.no_grad()
def track(bn: BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Bring the running statistics of a BatchNorm nearer to those of a batch, both (C,); the variance is unbiased."""
    if not bn.track_running_stats:
        return
    assert bn.num_batches_tracked is not None
    assert bn.running_mean is not None and bn.running_var is not None
    bn.num_batches_tracked += 1
    rate = 1 / bn.num_batches_tracked.item() if bn.momentum is None else bn.momentum
    bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), rate)
    bn.running_var.lerp_(variance.to(bn.running_var.dtype), rate)


def sum_over_processes(t: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes of a run."""
    return _Sum.apply(t)


class _Sum(torch.autograd.Function):
    """A sum over processes, whose gradient is the sum of the gradients.

    The default group of that in `torch.distributed.nn` is the one of its import, even if it was destroyed since.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        total = t.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_processes(gradient)


def is_shared() -> bool:
    """Return whether this run has several processes."""
    return distributed.is_initialized() and distributed.get_world_size() > 1


def agrees(layer: nn.Module, answer: bool, about: Hashable, device: torch.device) -> bool:
    """Return whether all processes of a run answer yes.

    They are asked once for each layer and thing that the answer is about, and again when a layer's answer changes. It
    changes in all processes at once, or they wait for each other: who adds hooks in mid-run adds them in all.
    """
    found = _agreed.setdefault(layer, {})
    if (about, answer) not in found:
        votes = torch.tensor(float(answer), device=device)
        distributed.all_reduce(votes, distributed.ReduceOp.MIN)
        found[about, answer] = bool(votes)
    return found[about, answer]


def synchronize_on_cpus(model: nn.Module) -> None:
    """Make each `torch.nn.SyncBatchNorm` of a model, in place, a `CPUSyncBatchNorm`."""
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = CPUSyncBatchNorm  # type: ignore[assignment]
