"""The networks that benchmarks/network.py measures, each as a `benchmarks.rounds.Case`."""

import pkgutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.published import aggregation, published
from overlock import OverLoCK, OverLoCKBackbone, keep_freed_memory
from overlock.models.network import Block
from overlock.models.overlock import Trunk

FORWARD = ('published', 'train', 'deploy', 'compile')
# A merged model does not train: there `compile` compiles the training form.
TRAIN = ('published', 'train', 'compile')
# Networks of timm's registry in the same rounds; there is nothing to compare their outputs with.
BESIDE = {
    'convnext_tiny': 'convnext_tiny',
    'convnext_small': 'convnext_small',
    'swin_tiny': 'swin_tiny_patch4_window7_224',
    'moganet_t': 'moganet_t',
    'moganet_s': 'moganet_s',
}


@dataclass
class NetworkCase:
    """One network, one mode, one shape; see `benchmarks.rounds`."""

    preset: str  # as `prepare` takes it, or as `beside` does
    arch: str
    network: str  # 'backbone' or 'classifier'
    mode: str  # 'forward' (evaluation, no gradients) or 'train' (forward, mean of squares of the outputs, backward)
    size: tuple[int, int]  # height and width of the images
    batch: int
    dtype: str  # 'fp32', 'fp64', or 'bf16' (autocast)
    device: torch.device

    def __post_init__(self) -> None:
        self.device, training = torch.device(self.device), self.mode == 'train'
        torch.manual_seed(0)
        if is_beside(self.preset):
            self.model = beside(self.preset, self.network, self.size, training).to(self.device)
        else:
            model = (OverLoCK if self.network == 'classifier' else OverLoCKBackbone)(self.arch)
            randomise(model)
            wide = torch.float64 if self.dtype == 'fp64' else torch.float32
            self.model = prepare(model.to(self.device, wide).train(training), self.preset)
        self.image = self._make_image(self.size, self.batch)
        self.facts = {'aggregation': aggregation(self.device).__name__} if self.preset == 'published' else {}

    def run(self, size: tuple[int, int] | None = None, batch: int = 1, dtype: str | None = None) -> dict[str, Tensor]:
        """Run one iteration, on `batch` images of another size or in another dtype if given."""
        image = self._make_image(size, batch) if size else self.image
        narrow = (dtype or self.dtype) == 'bf16'
        with torch.inference_mode(self.mode == 'forward'):
            with torch.autocast(self.device.type, torch.bfloat16) if narrow else nullcontext():
                found = outputs(self.model(image))
                if self.mode == 'forward':
                    return found
                wide = torch.promote_types(image.dtype, torch.float32)
                loss = torch.stack([out.to(wide).square().mean() for out in found.values()]).sum()
        parameters = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        # torch.compile puts the model behind `_orig_mod`.
        return {name: out.detach() for name, out in found.items()} | {
            f'gradient {name.removeprefix("_orig_mod.")}': gradient
            for name, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        }

    def _make_image(self, size: tuple[int, int], batch: int) -> Tensor:
        """Return the images of a shape, the same for every preset."""
        image = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
        return image.to(self.device, next(self.model.parameters()).dtype)


def prepare(model: Trunk, preset: str) -> nn.Module:
    """Bring our model to the form of a preset: one of `FORWARD` or `TRAIN`, or 'module:function' that does so.

    Raises:
        ValueError: If there is no such preset, or it does not train.
    """
    if ':' in preset:
        return pkgutil.resolve_name(preset)(model)
    names = TRAIN if model.training else FORWARD
    if preset not in names:
        raise ValueError(f"preset must be one of {', '.join(names)} or 'module:function', got {preset!r}")
    if preset == 'published':
        return published(model, next(model.parameters()).device)
    if preset != 'train':
        model = deploy(model)
    return torch.compile(model, dynamic=False) if preset == 'compile' else model  # type: ignore[return-value]


def deploy(model: Trunk) -> Trunk:
    """Return the model in the form of its mode: merged in evaluation, as it is in training."""
    return model if model.training else model.switch_to_deploy()


def channels_last(model: Trunk) -> Trunk:
    """Set the memory format; the preset 'benchmarks.presets:channels_last'."""
    model = deploy(model)
    model.memory_format = torch.channels_last
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def keep_memory(model: Trunk) -> Trunk:
    """Keep freed memory in this process; the preset 'benchmarks.presets:keep_memory'."""
    keep_freed_memory()
    return deploy(model)


def checkpointed(model: Trunk) -> Trunk:
    """Set `with_cp=True`; the preset 'benchmarks.presets:checkpointed'."""
    for module in model.modules():
        if hasattr(module, 'with_cp'):
            module.with_cp = True  # type: ignore[assignment]
    return model


def compile_blocks(model: Trunk) -> Trunk:
    """Compile each block by itself, in a fraction of the time; the preset 'benchmarks.presets:compile_blocks'."""
    # One graph for each stage, dtype and size; torch's limit of 8 would leave the others as they are without a word.
    torch._dynamo.config.recompile_limit = 64
    for block in deploy(model).modules():
        if isinstance(block, Block):
            block.compile(dynamic=False)
    return model


def cuda_graphs(model: Trunk) -> nn.Module:
    """Compile and replay as CUDA graphs; the preset 'benchmarks.presets:cuda_graphs'."""
    return torch.compile(deploy(model), mode='reduce-overhead', dynamic=False)  # type: ignore[return-value]


def is_beside(preset: str) -> bool:
    """Return whether a preset is a network of timm's registry, see `beside`."""
    return preset.removesuffix('+compile') in BESIDE


def beside(preset: str, network: str, size: tuple[int, int], training: bool) -> nn.Module:
    """Return a network of timm with random weights: its four maps beside a backbone, else its classifier.

    The preset is a key of `BESIDE`. With '+compile' at its end the network is compiled, in evaluation with CUDA graphs.
    MogaNet, which is ours, has the form of `deploy`.
    """
    import timm

    import overlock.timm  # noqa: F401  (registers)

    name = BESIDE[preset.removesuffix('+compile')]
    options: dict[str, Any] = {'features_only': True} if network == 'backbone' else {}
    if name.startswith('swin'):
        options |= {'img_size': size, 'strict_img_size': False}
    if name.startswith('moganet'):
        options |= {'deploy': not training}
    model = timm.create_model(name, pretrained=False, **options).train(training)
    if not preset.endswith('+compile'):
        return model
    return torch.compile(model, mode='default' if training else 'reduce-overhead', dynamic=False)  # type: ignore[return-value]


def outputs(found: Tensor | Iterable[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs of a network by name."""
    if isinstance(found, Tensor):
        found = [found]
    pairs = found.items() if isinstance(found, Mapping) else enumerate(found)
    return {f'output {key}': out for key, out in pairs}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Set parameters and statistics under which no part of the network is an identity, the same for every preset."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        mean, spread = float(name.endswith(('weight', 'running_var'))), 0.1
        if tensor.ndim == 3:  # position bias
            spread = 0.5
        elif tensor.ndim == 4 and len(tensor) == 1:  # GRN
            spread = 0.2
        elif tensor.ndim == 4 and tensor[0].numel() > 1:
            # Below the root of 1 / fan-in: shortcuts carry most, and rounding errors do not grow from block to block.
            mean, spread = 0, 0.4 * tensor[0].numel() ** -0.5
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread + mean)
