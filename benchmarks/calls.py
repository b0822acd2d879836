"""The calls of ContMix that benchmarks/operator.py compares, each backend as a case for a worker."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import published
from overlock import contmix, get_arch

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
# The published pipeline step by step, on natten's kernel or on an unfold; not backends of ours.
PIPELINES = {'published': published.aggregate_natten, 'unfold': published.aggregate_unfold}
REGIONS = 7


class OperatorCase:
    """One call of ContMix as the network makes it.

    Args:
        backend: One of `overlock.ops.contmix.BACKENDS` or of `PIPELINES`, or 'module:function' with a function of
            the signature of a backend's `contmix`.
        channels: C of the value map.
        groups: G.
        kernel_sizes: k and K.
        size: Height and width of the map.
        batch: Maps.
        dtype: 'fp32', 'bf16' or 'fp16', of query, key and value; the parameters are float32, under autocast.
        device: 'cpu' or 'cuda'.
        exact: Whether to compute in float64, on inputs rounded to `dtype`.
    """

    def __init__(
        self,
        backend: str,
        channels: int,
        groups: int,
        kernel_sizes: tuple[int, int],
        size: tuple[int, int],
        batch: int,
        dtype: str,
        device: str,
        exact: bool = False,
    ) -> None:
        self.device, self.dtype, self.exact = torch.device(device), dtype, exact
        # As in the network: on CPUs ours runs in channels_last, the published pipeline never does.
        self.channels_last = self.device.type == 'cpu' and backend not in PIPELINES
        self.channels, self.groups, self.kernel_sizes, self.batch = channels, groups, tuple(kernel_sizes), batch
        self.function = pick(
            backend, kernel_sizes=self.kernel_sizes, num_groups=groups, scale=(channels / groups) ** -0.5
        )
        self.size = tuple(size)
        self.made: dict[tuple[int, int], tuple[list[Tensor], Tensor]] = {}
        self.inputs(self.size)
        self.facts: dict[str, Any] = {}

    def run(self, size: tuple[int, int] | None = None, train: bool = True) -> dict[str, Tensor]:
        """One call, on a map of another size if given, and with `train` its backward pass."""
        inputs, grad = self.inputs(tuple(size or self.size))
        if not train:
            with torch.inference_mode():
                return {'output': self.call(inputs)}
        out = self.call(inputs)
        gradients = torch.autograd.grad(out, inputs, grad.to(out.dtype))
        return {'output': out.detach()} | {f'gradient {i}': gradient for i, gradient in enumerate(gradients)}

    def passes(self) -> dict[str, Callable[[], Any]]:
        """The forward and the backward pass as functions of their own."""
        inputs, grad = self.inputs(self.size)
        out = self.call(inputs)
        return {
            'forward': partial(self.run, train=False),
            'backward': lambda: torch.autograd.grad(out, inputs, grad.to(out.dtype), retain_graph=True),
        }

    def call(self, inputs: list[Tensor]) -> Tensor:
        """The output."""
        with self.autocast():
            return self.function(*inputs)

    def autocast(self) -> AbstractContextManager:
        """The dtype's, where it is narrow."""
        narrow = self.dtype != 'fp32' and not self.exact
        return torch.autocast(self.device.type, DTYPES[self.dtype]) if narrow else nullcontext()

    def inputs(self, size: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
        """Query, key, value, weight, bias, rpb_small and rpb_large, and the gradient of the output; made once."""
        if size not in self.made:
            generator = torch.Generator().manual_seed(0)
            half, taps = self.channels // 2, sum(kernel**2 for kernel in self.kernel_sizes)
            shapes = [
                (self.batch, half, *size),
                (self.batch, half, REGIONS, REGIONS),
                (self.batch, 2 * half, *size),
                (taps, REGIONS**2),
                (taps,),
                *((self.groups, 2 * k - 1, 2 * k - 1) for k in self.kernel_sizes),
                (self.batch, 2 * half, *size),
            ]
            values = [torch.randn(shape, generator=generator) for shape in shapes]
            values[3] /= REGIONS
            for index in (0, 1, 2, 7):
                values[index] = values[index].to(DTYPES[self.dtype])
                if self.channels_last:
                    values[index] = values[index].contiguous(memory_format=torch.channels_last)
            values = [value.to(self.device, torch.float64 if self.exact else value.dtype) for value in values]
            self.made = {size: ([value.requires_grad_() for value in values[:7]], values[7])}
        return self.made[size]

    def clear(self) -> None:
        """Does nothing: no gradient outlives `run`."""


build = OperatorCase


def pick(backend: str, **options: Any) -> Callable[..., Tensor]:
    """The function of a backend, a pipeline, or 'module:function'."""
    if backend in PIPELINES:
        return partial(published.contmix, aggregate=PIPELINES[backend], **options)
    if ':' in backend:
        module, _, function = backend.partition(':')
        return partial(getattr(importlib.import_module(module), function), **options)
    return partial(contmix, backend=backend, **options)


def shape_of(arch: str, stage: int, size: tuple[int, int]) -> dict[str, Any]:
    """Channels, groups, kernel sizes and map of the calls at stride 16 (stage 3) or 32 (stage 4) for an image."""
    shape = get_arch(arch)
    kernel, stride = shape.dynamic_kernel_sizes[stage - 3], 2 ** (stage + 1)
    # The network enlarges maps that are smaller than the kernel.
    return {
        'channels': shape.embed_dims[stage - 1],
        'groups': shape.focus_groups[stage - 3],
        'kernel_sizes': (shape.small_kernel_size, kernel),
        'size': tuple(max(kernel, -(-side // stride)) for side in size),
    }
