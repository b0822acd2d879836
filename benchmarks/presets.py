"""The networks that benchmarks/network.py compares, each as a case for a worker."""

import importlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.published import aggregation, published
from overlock import OverLoCK, OverLoCKBackbone, keep_freed_memory

DTYPES = {'fp32': torch.float32, 'fp64': torch.float64, 'bf16': torch.bfloat16}
FORWARD = ('published', 'train', 'deploy', 'compile')
# A merged model does not train: there `compile` compiles the training form.
TRAIN = ('published', 'train', 'compile')
# Names of timm, to stand beside ours; nothing to compare their outputs with.
BESIDE = {'convnext_tiny': 'convnext_tiny', 'swin_tiny': 'swin_tiny_patch4_window7_224'}


class NetworkCase:
    """One network, one mode, one shape.

    Args:
        preset: 'published', 'train', 'deploy', 'compile', a key of `BESIDE`, or 'module:function' with a function from
            our model in the right mode to the network to run; with '+bf16' behind it, it runs in bfloat16.
        arch: Variant of OverLoCK.
        network: 'backbone' or 'classifier'.
        mode: 'forward' (evaluation, no gradients) or 'train' (forward, mean of squares of the outputs, backward).
        size: Height and width of the images.
        batch: Images.
        dtype: 'fp32', 'fp64', or 'bf16' (autocast).
        device: 'cpu' or 'cuda'.
    """

    def __init__(
        self,
        preset: str,
        arch: str,
        network: str,
        mode: str,
        size: tuple[int, int],
        batch: int,
        dtype: str,
        device: str,
    ) -> None:
        preset, _, suffix = preset.partition('+')
        if suffix not in ('', 'bf16'):
            raise ValueError(f"a preset may end in '+bf16', got '+{suffix}'")
        self.device, self.mode, self.dtype = torch.device(device), mode, suffix or dtype
        self.size, self.batch = tuple(size), batch
        torch.manual_seed(0)
        if preset in BESIDE:
            self.model = beside(BESIDE[preset], network, self.size).to(self.device).train(mode == 'train')
        else:
            model = (OverLoCK if network == 'classifier' else OverLoCKBackbone)(arch)
            randomise(model)
            model = model.to(self.device, DTYPES['fp64' if dtype == 'fp64' else 'fp32']).train(mode == 'train')
            self.model = prepare(model, preset)
        self.images: dict[tuple, Tensor] = {}
        self.image(self.size, batch)
        self.facts = {'aggregation': aggregation(device).__name__} if preset == 'published' else {}

    def run(
        self, size: Iterable[int] | None = None, batch: int | None = None, dtype: str | None = None
    ) -> dict[str, Tensor]:
        """One iteration, of another shape or dtype if given: outputs, and in training gradients by name."""
        self.clear()
        image = self.image(tuple(size or self.size), batch or self.batch)
        if self.mode == 'forward':
            with torch.inference_mode(), self.autocast(dtype or self.dtype):
                return outputs(self.model(image))
        with self.autocast(dtype or self.dtype):
            found = outputs(self.model(image))
            loss = sum(
                out.float().square().mean() if out.dtype != torch.float64 else out.square().mean()
                for out in found.values()
            )
        loss.backward()
        found = {name: out.detach() for name, out in found.items()}
        # torch.compile puts the model behind `_orig_mod`.
        return found | {
            f'gradient {name.removeprefix("_orig_mod.")}': parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def autocast(self, dtype: str) -> AbstractContextManager:
        """bfloat16 where the dtype says so."""
        return torch.autocast(self.device.type, torch.bfloat16) if dtype == 'bf16' else nullcontext()

    def image(self, size: tuple[int, int], batch: int) -> Tensor:
        """The images of a shape, made once, the same for every preset."""
        if (size, batch) not in self.images:
            generator = torch.Generator().manual_seed(1)
            dtype = next(self.model.parameters()).dtype
            self.images = {(size, batch): torch.randn(batch, 3, *size, generator=generator).to(self.device, dtype)}
        return self.images[size, batch]

    def clear(self) -> None:
        """Drops the gradients."""
        self.model.zero_grad(set_to_none=True)


build = NetworkCase


def prepare(model: nn.Module, preset: str) -> nn.Module:
    """Our model in the form of a preset.

    Raises:
        ValueError: If there is no such preset, or it does not train.
    """
    device = next(model.parameters()).device
    if ':' in preset:
        module, _, function = preset.partition(':')
        return getattr(importlib.import_module(module), function)(model)
    if preset not in (TRAIN if model.training else FORWARD):
        raise ValueError(
            f'preset must be one of {", ".join(TRAIN if model.training else FORWARD)} or '
            f"'module:function', got {preset!r}"
        )
    if preset == 'published':
        return published(model, device)
    if preset != 'train' and not model.training:
        model.switch_to_deploy()
    return torch.compile(model, dynamic=False) if preset == 'compile' else model


def channels_last(model: nn.Module) -> nn.Module:
    """`train` or `deploy`, as the mode is, in this memory format; the preset 'benchmarks.presets:channels_last'."""
    if not model.training:
        model.switch_to_deploy()
    model.memory_format = torch.channels_last
    return model.to(memory_format=torch.channels_last)


def keep_memory(model: nn.Module) -> nn.Module:
    """`train` or `deploy`, as the mode is, in a process that keeps freed memory; 'benchmarks.presets:keep_memory'."""
    if not model.training:
        model.switch_to_deploy()
    keep_freed_memory()
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    """`train` with `with_cp=True`; the preset 'benchmarks.presets:checkpointed'."""
    for module in model.modules():
        if hasattr(module, 'with_cp'):
            module.with_cp = True
    return model


def beside(name: str, network: str, size: tuple[int, int]) -> nn.Module:
    """A network of timm with random weights: its four maps where ours is a backbone, else its classifier."""
    import timm

    options: dict[str, Any] = {'features_only': True} if network == 'backbone' else {}
    if name.startswith('swin'):
        options |= {'img_size': size, 'strict_img_size': False}
    return timm.create_model(name, pretrained=False, **options)


def outputs(found: Tensor | Iterable[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's output by name."""
    if isinstance(found, Tensor):
        found = [found]
    pairs = found.items() if isinstance(found, Mapping) else enumerate(found)
    return {f'output {key}': out for key, out in pairs}


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Parameters and statistics under which no part of the network is an identity, the same for every preset."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:  # position bias
            normal(parameter, 0, 0.5)
        elif parameter.ndim == 4 and parameter.shape[1:].numel() == 1:  # layer scale
            normal(parameter, 1, 0.1)
        elif parameter.ndim == 4 and len(parameter) == 1:  # GRN
            normal(parameter, 0, 0.2)
        elif parameter.ndim == 4:
            # Below the root of 1 / fan-in: shortcuts carry most, and rounding errors do not grow from block to block.
            normal(parameter, 0, 0.4 * parameter[0].numel() ** -0.5)
        else:
            normal(parameter, 1.0 if name.endswith('weight') else 0.0, 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith('running_mean'):
            normal(buffer, 0, 0.1)
        elif name.endswith('running_var'):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
