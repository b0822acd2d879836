"""Synchronized BatchNorm on CPUs: two processes give what one gives for all images."""

import pytest
import torch
from torch import distributed, multiprocessing, nn

from overlock.layers import DilatedReparamConv, sync_norm
from overlock.layers.sync_norm import CPUSyncBatchNorm, synchronize_on_cpus
from overlock.ops import dilated
from overlock.ops.depthwise import compute_dtype
from overlock.utils.distributed import leave_group

# Shares of different sizes.
SHARES = (slice(0, 3), slice(3, 5))


def _network():
    torch.manual_seed(0)
    last = nn.BatchNorm2d(3, momentum=None, affine=False)
    network = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), DilatedReparamConv(3, 5), last)
    nn.init.normal_(network[0].weight)
    return network.double(), torch.randn(5, 4, 6, 7, dtype=torch.float64) * 3 + 1


def _step(network, images, count=2):
    """Run training steps; return the output, the state and the gradients of the weights and images."""
    images = images.clone().requires_grad_()
    for _ in range(count):
        output = network(images)
        (output.pow(3).sum() + output.sin().sum()).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return output.detach(), dict(network.state_dict()), gradients, images.grad


def _share(rank, folder):
    distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    (network, images), (other, _), (fused, _) = (_network() for _ in range(3))
    network, other, fused = map(nn.SyncBatchNorm.convert_sync_batchnorm, (network, other, fused))
    for each in (network, other, fused):
        synchronize_on_cpus(each)
    assert isinstance(network[0], CPUSyncBatchNorm)
    torch.save(_step(network, images[SHARES[rank]]), f'{folder}/{rank}.pth')
    evaluated = network.eval()(images)
    if rank == 0:
        torch.save(evaluated.detach(), f'{folder}/evaluated.pth')
    # One process has one value a channel. PyTorch lets biases share the memory of such gradients: one step.
    images = images[:1, :, : 1 + 2 * rank, : 1 + rank]
    other[2]._fuses = lambda x: False
    torch.save([_step(each, images, 1) for each in (fused, other)], f'{folder}/uneven{rank}.pth')
    # One process has no images.
    shares = [images[:0], images][:: 1 - 2 * rank]
    torch.save([_step(each, shares[0], 1)[1:] for each in (fused, other)], f'{folder}/empty{rank}.pth')
    # What one process cannot, none does: with hooks, in another dtype.
    layer = fused[2]
    assert layer._fuses(images) and layer._fuses(images[:0])
    handle = layer.bn.register_forward_hook(lambda *_: None) if rank else None
    sync_norm._agreed.clear()
    assert not layer._fuses(images)
    if handle:
        handle.remove()
    sync_norm._agreed.clear()
    why_unsupported = dilated.why_unsupported
    dilated.why_unsupported = lambda x: 'wrong' if rank and compute_dtype(x) == torch.float32 else why_unsupported(x)
    narrow = images.float()
    assert not layer._fuses(narrow) and not layer._fuses(narrow) and layer._fuses(images)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer._fuses(narrow)
    leave_group()


def test_two_processes_give_the_output_statistics_and_gradients_of_one(tmp_path):
    multiprocessing.spawn(_share, (str(tmp_path),), nprocs=2)
    network, images = _network()
    output, state, gradients, image_gradients = _step(network, images)
    shares = [torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1)]
    for rank, (share, found) in enumerate(zip(SHARES, shares, strict=True)):
        torch.testing.assert_close(found[0], output[share], rtol=1e-12, atol=1e-12, msg=f'output of {rank}')
        torch.testing.assert_close(found[1], state, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[3], image_gradients[share], rtol=1e-10, atol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(shares[0][2][name] + shares[1][2][name], gradient, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.load(tmp_path / 'evaluated.pth'), network.eval()(images).detach())
    for rank in (0, 1):
        fused, other = torch.load(tmp_path / f'uneven{rank}.pth')
        torch.testing.assert_close(fused, other, rtol=1e-10, atol=1e-10)
        fused, other = torch.load(tmp_path / f'empty{rank}.pth')
        torch.testing.assert_close(fused, other, rtol=1e-10, atol=1e-10)


def test_a_run_of_one_process_refuses_one_value_a_channel_as_pytorch_does(tmp_path):
    layers = [synced(nn.BatchNorm2d(3)), synced(DilatedReparamConv(3, 5))]
    distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        for layer in layers:
            with pytest.raises(ValueError, match='more than 1 value per channel'):
                layer(torch.randn(1, 3, 1, 1))
    finally:
        distributed.destroy_process_group()


def synced(module):
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    synchronize_on_cpus(module)
    return module


def test_one_process_needs_no_group():
    network, images = _network()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(_network()[0])
    synchronize_on_cpus(synced)
    torch.testing.assert_close(_step(synced, images), _step(network, images))
