"""What networks share: images, blocks that recompute, drop-path rates, and what weight files may lack."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Integral
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from overlock.layers.fold import BatchNorm
from overlock.models.forms import Foldable

MIN_SIZE = 32


class Block(nn.Module):
    """A block of a network, to be run by `run_block`.

    Attributes:
        with_cp: Whether its activations are computed again in the backward pass, to save memory.
    """

    with_cp = False


def run_block(block: nn.Module, *maps: Tensor, forward: Callable[..., Any] | None = None) -> Any:
    """Run a block; if its `with_cp` is set, compute its activations again in the backward pass, not keep them.

    A block whose `forward` calls this gives what to run instead.
    """
    # A bound method has no truth for torch.compile.
    forward = block if forward is None else forward
    if block.with_cp and torch.is_grad_enabled():
        # torch.compile makes the second run pure by itself, and takes no context for it.
        context: dict[str, Any] = (
            {} if torch.compiler.is_compiling() else {'context_fn': lambda: (nullcontext(), _same_statistics(block))}
        )
        return torch.utils.checkpoint.checkpoint(forward, *maps, use_reentrant=False, **context)
    return forward(*maps)


@contextmanager
def _same_statistics(block: nn.Module) -> Iterator[None]:
    """Keep the second run of a block from updating the running statistics of its BatchNorms again."""
    norms = [module for module in block.modules() if isinstance(module, BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, kept, strict=True):
        norm.momentum, norm.num_batches_tracked = 0.0, count if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def check_counts(**counts: int) -> None:
    """Raise a ValueError unless each argument is a positive integer."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f'{name} must be a positive integer, got {count!r}')


def check_rate(**rates: float) -> None:
    """Raise a ValueError unless each argument is in [0, 1)."""
    for name, rate in rates.items():
        if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f'{name} must be in [0, 1), got {rate!r}')


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the drop-path rate of each block by stage: linear from 0 to `rate` over all blocks in order.

    Raises:
        ValueError: If `rate` is not in [0, 1).
    """
    check_rate(drop_path_rate=rate)
    rates = (rate * i / (sum(depths) - 1) for i in range(sum(depths)))
    return [[next(rates) for _ in range(depth)] for depth in depths]


class Network(Foldable):
    """A network of blocks for images, and what weight files may have less or more than it.

    Attributes:
        memory_format: Memory format of the maps inside; None means channels_last on CPUs, elsewhere that of the image.
        new_parts: Beginnings of names that a dense-prediction backbone adds to the ImageNet network.
        head_parts: Beginnings of names of ImageNet heads, which a backbone leaves out.
        stage_parts: Beginnings of names of stages, which a network may leave out as a whole.
        block_stages: Names of the lists of blocks at strides 4, 8, 16 and 32.
        stage_depth: How many parts of a name tell the stage.
    """

    memory_format: torch.memory_format | None = None
    new_parts: tuple[str, ...] = ()
    head_parts: tuple[str, ...] = ('head.',)
    stage_parts: tuple[str, ...] = ()
    block_stages: tuple[tuple[str, ...], ...] = ((), (), (), ())
    stage_depth = 1
    in_channels: int

    def prepare(self, x: Tensor) -> Tensor:
        """Check an image (B, in_channels, H, W) and give it the memory format of the maps inside.

        Raises:
            ValueError: If it is smaller than 32x32, has other channels, or is not a batch.
        """
        if x.ndim != 4:
            raise ValueError(f'input must have shape (B, C, H, W), got {tuple(x.shape)}; stack images into a batch')
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f'input must have {self.in_channels} channels, got {x.shape[1]}; build the network with '
                f'in_channels={x.shape[1]}, or convert the image'
            )
        if min(x.shape[2:]) < MIN_SIZE:
            raise ValueError(
                f'input must be at least {MIN_SIZE}x{MIN_SIZE} pixels, got {x.shape[2]}x{x.shape[3]}; enlarge or pad it'
            )
        # oneDNN's depthwise kernels are up to 20 times faster in channels_last.
        memory_format = self.memory_format or (torch.channels_last if x.device.type == 'cpu' else None)
        return x if memory_format is None else x.contiguous(memory_format=memory_format)

    def shorten(self, num_outputs: int) -> None:
        """Remove all that only later outputs need, in place."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool | Sequence[int] = True) -> None:
        """Make blocks recompute their activations in the backward pass, to save memory, or not.

        Args:
            enable: True for all blocks, False for none, or how many of the first blocks at each of the strides 4, 8, 16
                and 32 (the authors' `--ckpt-stg`).

        Raises:
            ValueError: If there are not four counts.
        """
        every = [sys.maxsize * enable] * 4 if isinstance(enable, bool) else enable
        counts = list(every) if isinstance(every, Sequence) else []
        if len(counts) != 4 or not all(isinstance(count, Integral) and count >= 0 for count in counts):
            raise ValueError(
                'gradient checkpointing takes True, False, or a number of blocks for each of the strides 4, 8, 16 and '
                f'32, got {enable}'
            )
        stages = dict(self.named_modules())
        for count, names in zip(counts, self.block_stages, strict=True):
            for name in names:
                for i, block in enumerate(stages.get(name, ())):
                    block.with_cp = i < count

    def stage_of(self, name: str) -> str:
        """Return the stage of an entry of a state dict, in our names."""
        return '.'.join(name.split('.')[: self.stage_depth])
