"""Shared by tests: tiny networks, tolerances, deterministic weights, comparisons."""

import copy
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from overlock import OverLoCK, OverLoCKBackbone

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).parent / 'data'

# Relative to the largest magnitude; a looser entry needs a reason beside it.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def assert_relative(actual, expected, tolerance: float) -> None:
    """Checks that the largest deviation is within `tolerance` of the largest expected magnitude."""
    actual, expected = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in (actual, expected))
    assert actual.shape == expected.shape
    deviation = (actual - expected).abs().max().item()
    assert deviation <= tolerance * expected.abs().max().item(), f'deviates by {deviation:.2e}'


def check_operator(operator, args, **options) -> None:
    """Hold an operator of `torch.library` to its rules: those that `opcheck` knows, and the strides of its fake."""
    torch.library.opcheck(operator, args, **options)
    found = operator(*args)
    with FakeTensorMode() as mode:
        faked = operator(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
    pairs = [(found, faked)] if isinstance(found, torch.Tensor) else zip(found, faked, strict=True)
    for i, (real, fake) in enumerate(pairs):
        # Where an axis has one element its stride means nothing.
        strides = [[t.stride(axis) for axis in range(t.ndim) if t.shape[axis] > 1] for t in (real, fake)]
        assert real.shape == fake.shape and strides[0] == strides[1], f'{operator}: output {i}'


def published_shapes() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Return the published shapes: by kind ('cls', 'cls_reparam', 'det', 'seg'), variant and name."""
    return json.loads(gzip.decompress((DATA / 'state_dicts.json.gz').read_bytes()))


def published_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """A float64 state dict that depends on names and shapes alone, as the golden values were computed with."""
    return {name: torch.from_numpy(np.asarray(_fill(name, tuple(shape)))) for name, shape in shapes.items()}


def _fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith('num_batches_tracked'):
        return np.zeros(shape, np.int64)
    noise = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    if name.endswith('running_mean'):
        return 0.1 * noise
    if name.endswith('running_var'):
        return 1 + 0.1 * np.abs(noise)
    if len(shape) == 3:  # relative position bias
        return 0.5 * noise
    if len(shape) == 4 and shape[1:] == (1, 1, 1):  # affine of a channel
        return 0.5 + 0.1 * noise
    if len(shape) == 4 and shape[0] == 1:  # GRN
        return 0.2 * noise
    if len(shape) == 4:
        return noise / np.sqrt(np.prod(shape[1:]))
    return 1 + 0.1 * noise if name.endswith('weight') else 0.1 * noise


def image(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A standard-normal image (batch, 3, height, width), float64."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal((batch, 3, height, width)))


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every parameter and statistic of a model values that no folding could get right by accident."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.ndim > 1 and tensor[0].numel() > 1:
                noise = (noise - 0.5) * 2 / tensor[0].numel() ** 0.5
            elif name.endswith(('weight', 'running_var')):
                noise = noise + 0.5
            else:
                noise = noise - 0.5
            tensor.copy_(noise)
    return model


# A network of the same kind, small enough to build in milliseconds.
TINY = dict(
    embed_dims=(8, 16, 16, 32), base_depths=(1, 1, 1), overview_depth=1, focus_depths=(2, 1), focus_groups=(2, 4)
)

MOGANET_TINY = dict(embed_dims=(8, 16, 16, 32), depths=(1, 2, 1, 1), ffn_ratios=(2, 2, 2, 2))

# Relative to the largest magnitude.
FOLDED = {torch.float64: 1e-10, torch.float32: 1e-5}

MODELS = {
    'classifier': lambda arch=TINY, **kwargs: OverLoCK(arch, **kwargs),
    'classifier without aux head': lambda arch=TINY, **kwargs: OverLoCK(arch, aux_head=False, **kwargs),
    'detection': lambda arch=TINY, **kwargs: OverLoCKBackbone(arch, **kwargs),
    'segmentation': lambda arch=TINY, **kwargs: OverLoCKBackbone(arch, overview_residual=False, **kwargs),
    **{
        f'outputs {indices}': lambda arch=TINY, indices=indices, **kwargs: OverLoCKBackbone(
            arch, out_indices=indices, **kwargs
        )
        for indices in ((0,), (1,), (2,), (3,), (0, 2))
    },
}


@torch.no_grad()
def assert_same(actual, expected, x, tolerance=None):
    """Checks that two models give the same on `x`, both the way they are."""
    actual, expected = actual(x), expected(x)
    if isinstance(actual, torch.Tensor):
        actual, expected = [actual], [expected]
    for ours, truth in zip(actual, expected, strict=True):
        assert ours.dtype == truth.dtype == x.dtype
        assert_relative(ours, truth, tolerance or FOLDED[x.dtype])


def in_form(model, form):
    """The state dict of a copy of a training-form model in another form."""
    return copy.deepcopy(model).to_form(form).state_dict()


def same(state, other):
    return list(state) == list(other) and all(torch.equal(value, other[name]) for name, value in state.items())


def training_step(layer, x, grad, fused, monkeypatch) -> list[torch.Tensor]:
    """Return the output, the gradients of input and parameters, and the buffers after a step, `fused` or not."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with monkeypatch.context() as patch:
        if not fused:
            patch.setattr(type(layer), '_fuses', lambda layer, x: False)
        y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], grad.to(y.dtype))
    return [y.detach(), *gradients, *(buffer.clone() for buffer in layer.buffers())]
