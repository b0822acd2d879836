"""What users rely on in the classifier and the backbone."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from overlock import ARCHS, Arch, MogaNetBackbone, OverLoCK, OverLoCKBackbone, get_arch
from overlock.layers import DropPath
from tests.testing import MOGANET_TINY, TINY, TOLERANCES, assert_relative, assert_same, image, randomise

# Parameters in millions, counted on the published shapes.
PARAMETERS = {
    'xt': (17.31, 15.66, 15.51),
    't': (34.99, 33.13, 32.80),
    's': (58.31, 56.45, 56.12),
    'b': (98.01, 96.09, 95.67),
}


def count(model: nn.Module) -> float:
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


@pytest.mark.parametrize('arch', ARCHS)
def test_parameter_counts_are_those_of_the_published_models(arch):
    with torch.device('meta'):
        models = OverLoCK(arch), OverLoCKBackbone(arch), OverLoCKBackbone(arch, overview_residual=False)
    assert tuple(count(model) for model in models) == PARAMETERS[arch]


def test_classifier_gives_both_logits_in_training_and_one_in_evaluation():
    model = OverLoCK(TINY, num_classes=5)
    x = image(2, 64, 64).float()
    out = model.train()(x)
    assert {name: tuple(t.shape) for name, t in out.items()} == {'main': (2, 5), 'aux': (2, 5)}
    sum(t.square().sum() for t in out.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(x).shape == (2, 5)
    assert OverLoCK(TINY, num_classes=5, aux_head=False).train()(x).shape == (2, 5)


@pytest.mark.parametrize(('height', 'width'), [(32, 32), (33, 47), (64, 200), (129, 65)])
def test_backbone_takes_any_size_from_32(height, width):
    model = OverLoCKBackbone(TINY).eval()
    with torch.no_grad():
        outs = model(image(1, height, width).float())
    assert model.out_channels == (8, 16, 24, 40)
    for i, out in enumerate(outs):
        stride = 4 * 2**i
        assert out.shape == (1, model.out_channels[i], -(-height // stride), -(-width // stride))
        assert out.isfinite().all()


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_outputs_are_contiguous_for_operators_that_read_memory_as_it_lies(memory_format):
    model = OverLoCKBackbone(TINY).eval()
    with torch.no_grad():
        outs = model(image(2, 96, 64).float().contiguous(memory_format=memory_format))
    assert all(out.is_contiguous() for out in outs)


@pytest.mark.parametrize('given', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ('asked', 'inside'),
    [
        (None, torch.channels_last),
        (torch.contiguous_format, torch.contiguous_format),
        (torch.channels_last, torch.channels_last),
    ],
    ids=str,
)
def test_maps_inside_have_the_memory_format_asked_for(asked, inside, given):
    model, seen = OverLoCKBackbone(TINY).eval(), []
    model.memory_format = asked
    model.base_net.stage1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(image(2, 64, 64).float().contiguous(memory_format=given))
    assert all(x.is_contiguous(memory_format=inside) for x in seen)


@pytest.mark.parametrize('model_class', [OverLoCK, OverLoCKBackbone])
def test_image_that_does_not_fit_is_refused_in_one_sentence(model_class):
    with pytest.raises(ValueError, match='at least 32x32 pixels, got 31x64'):
        model_class(TINY)(torch.zeros(1, 3, 31, 64))
    with pytest.raises(ValueError, match=r'\(B, C, H, W\), got \(3, 64, 64\)'):
        model_class(TINY)(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match='must have 3 channels, got 4; build the network with in_channels=4'):
        model_class(TINY)(torch.zeros(1, 4, 64, 64))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_kept_and_near_float32(dtype):
    # As initialized, maps shrink block by block to the subnormal numbers of float16.
    model = randomise(OverLoCKBackbone(TINY)).eval()
    x = image(1, 64, 96).float()
    with torch.no_grad():
        expected = model(x)
        actual = copy.deepcopy(model).to(dtype)(x.to(dtype))
    for ours, truth in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        # Against float32, whose own rounding is what float64 shows.
        assert_relative(ours, truth, max(TOLERANCES[dtype], TOLERANCES[torch.float32]))


def test_bfloat16_autocast_trains():
    model = OverLoCKBackbone(TINY).train()
    with torch.autocast('cpu', torch.bfloat16):
        loss = sum(out.float().square().mean() for out in model(image(2, 64, 64).float()))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (0,), (1,), (2,), (3,), (0, 2), (2, 3)], ids=str)
@pytest.mark.parametrize('overview_residual', [True, False])
def test_every_parameter_gets_a_gradient_whatever_is_returned(out_indices, overview_residual):
    model = OverLoCKBackbone(TINY, out_indices=out_indices, overview_residual=overview_residual).train()
    whole = OverLoCKBackbone(TINY, overview_residual=overview_residual)
    whole.load_state_dict(model.state_dict(), strict=False)
    outs = model(image(2, 64, 64).float())
    assert [out.shape[1] for out in outs] == [whole.out_channels[i] for i in out_indices]
    with torch.no_grad():
        for i, out in zip(out_indices, outs, strict=True):
            assert_relative(out.detach(), whole.train()(image(2, 64, 64).float())[i], 1e-5)
    sum(out.square().mean() for out in outs).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


BLOCKS = (
    'base_net.stage1',
    'base_net.stage2',
    'base_net.stage3',
    'overview_net.stage',
    'focus_net.stage3',
    'focus_net.stage4',
)


def test_checkpointing_changes_no_value():
    torch.manual_seed(0)
    model = OverLoCKBackbone(TINY).train()
    checkpointed = OverLoCKBackbone(TINY, with_cp=True).train()
    checkpointed.load_state_dict(model.state_dict())
    x = image(2, 64, 64).float()
    for net in (model, checkpointed):
        sum(out.square().mean() for out in net(x)).backward()
    for ours, truth in zip(checkpointed.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, truth.grad)
    for ours, truth in zip(checkpointed.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, truth)


def test_checkpointing_keeps_fewer_activations():
    def kept(with_cp):
        total, model = [], OverLoCKBackbone(TINY, with_cp=with_cp).train()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.numel()) or t, lambda t: t)
        with hooks:
            model(image(2, 64, 64).float())
        return sum(total)

    assert kept(True) < 0.5 * kept(False)
    assert kept(True) < kept((0, 0, 1, 1)) < kept((0, 0, 0, 1)) < kept(False)


def test_checkpointing_takes_a_number_of_blocks_for_each_stride():
    model = OverLoCKBackbone('t', with_cp=(1, 0, 3, 2))
    found = {name: sum(block.with_cp for block in model.get_submodule(name)) for name in BLOCKS}
    assert found == dict(zip(BLOCKS, (1, 0, 3, 2, 3, 2), strict=True))
    model.set_grad_checkpointing(False)
    assert not any(block.with_cp for name in BLOCKS for block in model.get_submodule(name))
    OverLoCKBackbone('xt', out_indices=(0, 1), with_cp=True)
    for counts in (2, (1, 2), (1, 2, 3, -1), (1.5, 0, 0, 0)):
        with pytest.raises(ValueError, match='a number of blocks for each of the strides 4, 8, 16 and 32, got'):
            model.set_grad_checkpointing(counts)


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 3, 4])
def test_frozen_stages_are_frozen_and_stay_in_evaluation(frozen_stages):
    model = OverLoCKBackbone(TINY, frozen_stages=frozen_stages)
    prefixes = [
        ('base_net.stem.',),
        ('base_net.stage1.',),
        ('base_net.downsample2.', 'base_net.stage2.'),
        ('base_net.downsample3.', 'base_net.stage3.'),
        ('overview_net.',),
    ]
    frozen = tuple(prefix for stage in prefixes[: frozen_stages + 1] for prefix in stage)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        assert model.train() is model
        sum(out.square().mean() for out in model(image(2, 64, 64).float())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen) if frozen else True), name
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (not name.startswith(frozen) if frozen else True), name
            moved = not torch.equal(module.running_mean, before[f'{name}.running_mean'])
            assert moved == module.training, name


def test_norm_eval_keeps_every_batch_norm_in_evaluation():
    model = OverLoCKBackbone(TINY, norm_eval=True).train().train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert model.focus_net.stage3[0].drop_path.training


def test_sync_batch_norm_conversion_reaches_every_batch_norm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(OverLoCKBackbone(TINY))
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}


def test_drop_path_rises_linearly_over_base_overview_and_focus():
    model = OverLoCKBackbone('xt', drop_path_rate=0.16)
    stages = (
        model.base_net.stage1,
        model.base_net.stage2,
        model.base_net.stage3,
        model.overview_net.stage,
        model.focus_net.stage3,
        model.focus_net.stage4,
    )
    rates = [block.drop_path.rate for stage in stages for block in stage]
    torch.testing.assert_close(rates, [0.01 * i for i in range(17)])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = DropPath(0.25).train()
    out = layer(torch.ones(4000, 2, 3))
    values = out.flatten(1)
    assert torch.equal(values.amin(1), values.amax(1))
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / 0.75]))
    assert abs(out.mean().item() - 1) < 0.05
    assert torch.equal(layer.eval()(out), out)


def test_weights_start_as_published():
    model = OverLoCKBackbone('xt')
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None or not module.bias.any()
            # The truncation at two absolute units never bites at this scale.
            assert module.weight.numel() < 2000 or abs(module.weight.std().item() - 0.02) < 2e-3
    assert (model.overview_scale.weight == 1e-5).all()
    assert (model.focus_net.stage3[1].prior_scale.weight == 1).all()


@pytest.mark.parametrize(
    ('make', 'error', 'message'),
    [
        (lambda: get_arch('xl'), ValueError, "one of xt, t, s, b .*got 'xl'"),
        (lambda: get_arch(3), TypeError, 'got int'),
        (
            lambda: get_arch({**TINY, 'depths': 3}),
            ValueError,
            "unexpected keyword argument 'depths'; its fields are embed_dims",
        ),
        (lambda: get_arch({'embed_dims': (8, 16, 16, 32)}), ValueError, 'missing 4 required positional arguments'),
        (lambda: get_arch({**TINY, 'embed_dims': (8, 16, 32)}), ValueError, r'must have 4 entries, got \(8, 16, 32\)'),
        (lambda: get_arch({**TINY, 'embed_dims': 8}), ValueError, 'must have 4 entries, got 8'),
        (lambda: get_arch({**TINY, 'focus_groups': (3, 4)}), ValueError, 'divisible by twice focus_groups'),
        (lambda: get_arch({**TINY, 'kernel_sizes': (17, 14, 13, 7)}), ValueError, 'must be odd'),
        (lambda: OverLoCKBackbone(TINY, out_indices=(3, 0)), ValueError, r'ascending and among 0 to 3, got \(3, 0\)'),
        (lambda: OverLoCK(TINY, num_classes=0), ValueError, 'num_classes must be a positive integer, got 0'),
        (lambda: OverLoCKBackbone(TINY, frozen_stages=5), ValueError, 'between -1 and 4, got 5'),
        (lambda: OverLoCKBackbone(TINY, drop_path_rate=1.0), ValueError, r'in \[0, 1\), got 1.0'),
        (lambda: OverLoCKBackbone(TINY, drop_path_rate='0.1'), ValueError, r"in \[0, 1\), got '0.1'"),
        (lambda: OverLoCKBackbone(TINY, in_channels=0), ValueError, 'in_channels must be a positive integer, got 0'),
        (lambda: OverLoCKBackbone(TINY, contmix_backend='fast'), ValueError, "got 'fast'"),
    ],
)
def test_wrong_arguments_are_one_clear_sentence(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_arch_of_ones_own_may_be_a_dict_or_a_dataclass():
    assert get_arch(TINY) == Arch(**TINY) == get_arch(Arch(**TINY))
    assert get_arch('s') is ARCHS['s']
    assert hash(Arch(**{**TINY, 'embed_dims': [8, 16, 16, 32]}))


def test_other_input_channels_work():
    assert OverLoCKBackbone(TINY, in_channels=5).eval()(torch.zeros(1, 5, 32, 32))[0].shape[1] == 8


BACKBONES = {
    'overlock': lambda **options: OverLoCKBackbone(TINY, **options),
    'moganet': lambda **options: MogaNetBackbone(MOGANET_TINY, **options),
}


@pytest.mark.slow
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('network', BACKBONES)
def test_compiled_network_is_one_graph_for_every_size(network, training):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    torch.manual_seed(0)
    model = BACKBONES[network]().train(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for size in ((256, 288), (288, 224), (416, 480)):
        results = []
        for each in (model, compiled):
            each.zero_grad()
            outs = each(image(2, *size).float())
            sum(out.square().mean() for out in outs).backward()
            results.append([*outs, *(parameter.grad for parameter in each.parameters())])
        largest = max(t.abs().max() for t in results[0])
        for ours, truth in zip(*results, strict=True):
            assert (ours - truth).abs().max() <= TOLERANCES[torch.float32] * largest
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1, 'a new size was compiled again'


def test_drop_path_survives_the_meta_device():
    x = torch.ones(1000, 2)
    assert torch.equal(DropPath(0.0).train()(x), x)
    with torch.device('meta'):
        made = DropPath(0.5).train()
    made = made.to_empty(device='cpu')
    assert set(made(x).unique().tolist()) == {0.0, 2.0}
    assert not made.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize('network', BACKBONES)
def test_exported_network_takes_other_sizes(network):
    model, side = BACKBONES[network](deploy=True).eval(), torch.export.Dim
    dims = {0: side('batch', min=1), 2: side('height', min=256), 3: side('width', min=256)}
    exported = torch.export.export(model, (image(2, 256, 288).float(),), dynamic_shapes=(dims,)).module()
    assert_same(exported, model, image(3, 320, 257).float())


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('network', BACKBONES)
def test_traced_network_can_be_saved_and_takes_other_batches(network, deploy, tmp_path):
    model = BACKBONES[network](deploy=deploy).eval()
    # The outputs are checked below; torch's own check compares the text of graphs.
    with torch.no_grad():
        torch.jit.trace(model, image(1, 224, 256).float(), check_trace=False).save(tmp_path / 'traced.pt')
    traced = torch.jit.load(tmp_path / 'traced.pt')
    with torch.no_grad():
        for x in (image(1, 224, 256).float(), image(3, 224, 256).float()):
            for ours, truth in zip(traced(x), model(x), strict=True):
                assert_relative(ours, truth, TOLERANCES[torch.float32])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_network_trains_in_other_dtypes(dtype):
    model = OverLoCKBackbone(TINY).to(dtype).train()
    sum(out.float().square().mean() for out in model(image(2, 64, 96).to(dtype))).backward()
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
