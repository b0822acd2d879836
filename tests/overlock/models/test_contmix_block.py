"""The plug-and-play block gives the authors' numbers under their names, folds, and fits into any network."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from overlock import ContMixBlock
from overlock.checkpoint import CheckpointError
from overlock.ops.compiled import why_not_compiled
from tests.testing import DATA, assert_relative, assert_same, published_weights, randomise

DOUBLE = 1e-10
# Name of a case in the golden values, and batch, height, width.
CASES = [
    ('dim64_heads2_k13_s5', 1, 32, 32),
    ('dim64_heads2_k13_s5', 2, 9, 20),  # smaller than the kernel
    ('dim64_heads2_k13_s5_nores', 1, 16, 24),
]
SCALES = [(False, None), (False, 0.5), (True, 0.5)]


@pytest.fixture(scope='module')
def published() -> dict:
    """The published shapes by name, and the names of parameters in their order."""
    return json.loads((DATA / 'state_dict_contmixblock.json').read_text())


@pytest.fixture(scope='module')
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / 'golden_contmixblock.npz') as file:
        return dict(file)


def build(published, case: str = CASES[0][0]) -> ContMixBlock:
    """Build the block of a case, with the weights that the golden values were computed with."""
    block = ContMixBlock(64, 2, 13, 5, res_scale=not case.endswith('nores'), ls_init_value=1.0).double()
    block.load_state_dict(published_weights(published['shapes'][CASES[0][0]]), strict=True)
    return block


def maps(batch: int, height: int, width: int, channels: int = 64) -> torch.Tensor:
    noise = np.random.Generator(np.random.PCG64(0)).standard_normal((batch, channels, height, width))
    return torch.from_numpy(noise)


def small(**options) -> ContMixBlock:
    return randomise(ContMixBlock(16, **options).double()).eval()


@pytest.mark.parametrize(('case', 'batch', 'height', 'width'), CASES)
def test_outputs_are_those_of_the_published_block(case, batch, height, width, published, golden):
    with torch.no_grad():
        out = build(published, case).eval()(maps(batch, height, width))
    key = f'{case}/{batch}x{height}x{width}'
    assert list(out.shape) == golden[f'{key}/shape'].tolist()
    assert_relative(out.flatten()[:: max(1, out.numel() // 4096)], golden[f'{key}/sample'], DOUBLE)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize(('case', 'batch', 'height', 'width'), CASES)
def test_training_loss_and_every_gradient_norm_are_those_of_the_published_block(
    case, batch, height, width, with_cp, published, golden
):
    block = build(published, case)
    block.with_cp = with_cp
    loss = block.train()(maps(batch, height, width)).square().mean()
    loss.backward()
    key = f'{case}/{batch}x{height}x{width}'
    assert_relative(loss.detach(), golden[f'{key}/loss'], DOUBLE)
    for parameter in block.parameters():
        parameter.data = parameter.grad
    gradients = block.published_state_dict()
    actual = np.array([gradients[name].norm().item() for name in published['parameters']])
    expected = golden[f'{key}/grad_norm']
    # A bias before a BatchNorm has no gradient but rounding, so each norm is held to the scale of the largest too.
    np.testing.assert_allclose(actual, expected, rtol=DOUBLE, atol=DOUBLE * 1e-3 * expected.max())


def test_checkpointing_updates_the_statistics_once(published):
    blocks = [build(published).train() for _ in range(2)]
    blocks[1].with_cp = True
    for block in blocks:
        block(maps(1, 13, 13)).sum().backward()
    for name, value in blocks[1].state_dict().items():
        torch.testing.assert_close(value, blocks[0].state_dict()[name], rtol=1e-12, atol=1e-12, msg=name)


def test_published_names_and_shapes_are_the_authors(published):
    given = published_weights(published['shapes'][CASES[0][0]])
    state = build(published).published_state_dict()
    assert set(state) == set(given)
    assert all(torch.equal(value, given[name]) for name, value in state.items())
    without_scale = set(ContMixBlock(64, 2, 13).published_state_dict())
    assert without_scale == {name for name in given if not name.startswith(('ls1', 'ls2'))}


def test_defaults_are_the_published_ones():
    block = ContMixBlock()
    assert block.kernel_sizes == (5, 7) and block.num_groups == 4 and block.ffn.fc1.out_channels == 256
    assert block.scale == 16**-0.5
    assert not block.scale_shortcut and block.ls1 is None and block.ls2 is None
    for rpb in (block.rpb_small, block.rpb_large):
        assert 0.015 < rpb.std().item() < 0.025 and rpb.abs().max().item() <= 2


@pytest.mark.parametrize('strict_name', ['our names', 'published names'])
def test_a_block_inside_a_network_loads_either_names(strict_name):
    block = small()
    state = block.published_state_dict() if strict_name == 'published names' else block.state_dict()
    network = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Sequential(ContMixBlock(16))).double().eval()
    given = {f'1.0.{name}': value for name, value in state.items()}
    network.load_state_dict({**given, '0.weight': torch.ones(16, 3, 1, 1), '0.bias': torch.zeros(16)}, strict=True)
    assert_same(network[1], block, maps(1, 9, 8, 16), 1e-12)
    del given['1.0.rpb_small' if strict_name == 'our names' else '1.0.rpb1']
    with pytest.raises(RuntimeError, match='Missing key.*0.rpb_small'):
        network[1].load_state_dict({name.removeprefix('1.'): value for name, value in given.items()}, strict=True)


@pytest.mark.parametrize('kernel_size', [5, 7, 19])
@pytest.mark.parametrize(('res_scale', 'ls_init_value'), SCALES)
def test_block_folds_exactly_and_once(res_scale, ls_init_value, kernel_size):
    block = small(kernel_size=kernel_size, res_scale=res_scale, ls_init_value=ls_init_value)
    folded = copy.deepcopy(block)
    for _ in range(2):
        assert folded.switch_to_deploy() is folded
        assert_same(folded, block, maps(2, 9, 8, 16), 1e-10)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    built = ContMixBlock(
        16, kernel_size=kernel_size, res_scale=res_scale, ls_init_value=ls_init_value, deploy=True
    ).double()
    assert list(built.state_dict()) == list(folded.state_dict())
    for state in (block.state_dict(), block.published_state_dict(), folded.state_dict()):
        randomise(built).load_state_dict(state, strict=True)
        assert_same(built.eval(), block, maps(1, 9, 8, 16), 1e-10)
    with pytest.raises(CheckpointError, match='no published names'):
        folded.published_state_dict()


@pytest.mark.parametrize('size', [(1, 1), (3, 40), (13, 13), (14, 20)])
@pytest.mark.parametrize('kernel_size', [13, 19])
def test_any_map_keeps_its_shape_and_gives_every_parameter_a_gradient(kernel_size, size):
    block = ContMixBlock(16, num_heads=1, kernel_size=kernel_size, drop_path=0.1, ls_init_value=1.0)
    x = torch.randn(2, 16, *size, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters()) and x.grad is not None


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (dict(dim=60, num_heads=2), 'dim must be a multiple of 4 x num_heads, got dim 60 and num_heads 2'),
        (dict(smk_size=4), 'smk_size must be odd and at most kernel_size 7, got 4'),
        (dict(smk_size=9), 'smk_size must be odd and at most kernel_size 7, got 9'),
        (dict(kernel_size=3), r'kernel_size must be one of \[5, 7, 9, 11, 13, 15, 17, 19\], got 3'),
        (dict(kernel_size=6), r'kernel_size must be one of \[5, 7, 9, 11, 13, 15, 17, 19\], got 6'),
        (dict(kernel_size='7'), "kernel_size must be a positive integer, got '7'"),
        (dict(num_heads=0), 'num_heads must be a positive integer, got 0'),
        (dict(dim=64.0), 'dim must be a positive integer, got 64.0'),
        (dict(mlp_ratio=0), 'mlp_ratio must be a positive number, got 0'),
        (dict(mlp_ratio='4'), "mlp_ratio must be a positive number, got '4'"),
        (dict(ls_init_value=False), 'ls_init_value must be a number, or None for no layer scale, got False'),
        (dict(drop_path=1.0), r'drop_path must be in \[0, 1\), got 1.0'),
        (dict(drop_path=-0.1), r'drop_path must be in \[0, 1\), got -0.1'),
        (dict(kernel_size=21), r'kernel_size must be one of \[5, 7, 9, 11, 13, 15, 17, 19\], got 21'),
        (dict(contmix_backend='fast'), "got 'fast'"),
    ],
)
def test_mistakes_are_told_when_the_block_is_built(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ContMixBlock(**options)


def test_ratio_may_be_a_fraction_and_layer_scale_a_whole_number():
    block = ContMixBlock(16, mlp_ratio=2.5, ls_init_value=1)
    assert block.ffn.fc1.out_channels == 40
    assert block.ls1.weight.dtype == torch.float32 and (block.ls1.weight == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('with_cp', [False, True])
def test_compiled_block_is_one_graph(with_cp, training):
    torch._dynamo.reset()
    block, x = small(with_cp=with_cp).train(training), maps(2, 6, 9, 16)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not_compiled()), reason='cpp: ' + why_not_compiled())
def test_training_step_of_a_compiled_block_has_the_same_gradients():
    torch._dynamo.reset()
    block, x = small().train(), maps(2, 6, 9, 16)
    parameters = list(block.parameters())
    # Other backends of torch.compile do not look at the strides of what operators return.
    steps = [torch.compile(block, backend='inductor', dynamic=False), block]
    found, expected = (torch.autograd.grad(step(x).square().sum(), parameters) for step in steps)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('shape', [(0, 16, 8, 8), (0, 16, 3, 3), (1, 16, 1, 9)], ids=str)
def test_dtypes_are_kept_for_batches_of_none_and_maps_of_a_pixel(shape, dtype):
    with torch.no_grad():
        out = small().to(dtype)(torch.ones(shape, dtype=dtype))
    assert out.shape == shape and out.dtype == dtype and out.isfinite().all()


def test_a_map_of_other_channels_is_told():
    with pytest.raises(ValueError, match=r'input must have shape \(B, 64, H, W\), got \(1, 32, 8, 8\)'):
        ContMixBlock()(torch.zeros(1, 32, 8, 8))


@pytest.mark.skipif(not os.environ.get('OVERLOCK_REFERENCE'), reason='OVERLOCK_REFERENCE names no folder')
def test_golden_values_are_the_reference_as_it_stands(golden, published):
    folder = Path(os.environ['OVERLOCK_REFERENCE'])
    assert json.loads((folder / 'state_dict_contmixblock.json').read_text()) == published
    with np.load(folder / 'golden_contmixblock.npz') as reference:
        assert set(reference.files) == set(golden)
        for key in golden:
            np.testing.assert_array_equal(golden[key], reference[key])
