#!/usr/bin/env python
"""Count what the processes of a training step send each other, and measure its share, with gloo on CPUs.

Three modes take turns in the same processes: `alone` sends nothing, `gradients` reduces gradients (DDP), `statistics`
also synchronizes BatchNorm. First the gradients of all processes are compared with those of one process on all images,
in float64. `links.py` makes the tables of docs/scaling.md from the JSON.
"""

import argparse
import copy
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.presets import randomise
from benchmarks.record import make_parser, size, write_result
from benchmarks.rounds import deviation, is_within, summary
from overlock import ARCHS, OverLoCKBackbone
from overlock.layers import DilatedReparamConv
from overlock.layers.sync_norm import CPUSyncBatchNorm, synchronize_on_cpus
from overlock.models.network import Block
from overlock.utils.distributed import leave_group

MODES = ('alone', 'gradients', 'statistics')
# Relative, in float64.
LIMIT = {'gradient': 1e-8}


class Collectives(TorchDispatchMode):
    """Count calls and bytes of all collectives of this process, those of DistributedDataParallel too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == 'c10d':
            name = func._opname.rstrip('_')
            self.calls[name] += 1
            self.bytes[name] += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, images: Tensor, reduces: bool = True) -> dict[str, Tensor]:
    """Run forward, mean of squares of the outputs, and backward; return the gradients by name."""
    with nullcontext() if reduces else model.no_sync():  # type: ignore[operator]
        torch.stack([out.square().mean() for out in model(images)]).sum().backward()
    found = {f'gradient {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def work(rank: int, processes: int, task: dict[str, Any], folder: str) -> None:
    """Run one of the processes; the first writes the row into the folder."""
    torch.set_num_threads(task['threads'])
    distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=processes)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(OverLoCKBackbone(task['arch']))
    synchronize_on_cpus(model)
    randomise(model)
    norms = [module for module in model.modules() if isinstance(module, CPUSyncBatchNorm)]
    row: dict[str, Any] = {
        'processes': processes,
        'parameters': sum(p.numel() for p in model.parameters()),
        'blocks': sum(isinstance(module, Block) for module in model.modules()),
        'on_gpus': statistics_on_gpus(model),
        'check': check(model, rank, processes, task['check_size']),
        'collectives': {},
        'modes': {mode: {'times': []} for mode in MODES},
    }
    gc.collect()  # the networks of the check, in float64
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    images = torch.randn(task['batch'], 3, *task['size'], generator=torch.Generator().manual_seed(rank))

    def run(mode: str) -> None:
        for norm in norms:
            norm.__class__ = CPUSyncBatchNorm if mode == 'statistics' else nn.BatchNorm2d  # type: ignore[assignment]
        step(parallel, images, mode != 'alone')

    for mode in MODES:
        for _ in range(2):  # after the first, DistributedDataParallel arranges its buckets anew and sends their order
            run(mode)
        with Collectives() as counted:
            run(mode)
        row['collectives'][mode] = {'calls': counted.calls.total(), 'bytes': counted.bytes.total()}
    for _ in range(task['rounds']):
        for mode in MODES:
            distributed.barrier()
            start = time.perf_counter()
            run(mode)
            longest = torch.tensor(time.perf_counter() - start)
            distributed.all_reduce(longest, distributed.ReduceOp.MAX)
            row['modes'][mode]['times'].append(longest.item())
    if rank == 0:
        Path(folder, 'row.json').write_text(json.dumps(row))
    leave_group()


def statistics_on_gpus(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return pairs of calls, and the bytes forward and backward of a process, as they would be on GPUs.

    One by one, `nn.SyncBatchNorm` gathers means, deviations and a count in float32, and sums two gradients. Merged, the
    branches of a large kernel share both calls, as in `overlock.ops.dilated`, which sums in float64.
    """
    large = [module for module in model.modules() if isinstance(module, DilatedReparamConv)]
    inside = {id(norm) for module in large for norm in module.modules()}
    widths, single = (
        [
            norm.num_features
            for norm in model.modules()
            if isinstance(norm, CPUSyncBatchNorm) and id(norm) not in without
        ]
        for without in ((), inside)
    )
    shapes = [(1 + len(module.branches), module.conv.out_channels) for module in large]
    forward, backward = (sum(4 * (2 * width + more) for width in single) for more in (1, 0))
    return {
        'one by one': {
            'pairs': len(widths),
            'forward': sum(4 * (2 * width + 1) for width in widths),
            'backward': sum(8 * width for width in widths),
        },
        'merged': {
            'pairs': len(single) + len(large),
            'forward': forward + sum(8 * (2 * count * width + 1) for count, width in shapes),
            'backward': backward + sum(8 * (count + 1) * width for count, width in shapes),
        },
    }


def check(model: nn.Module, rank: int, processes: int, size: tuple[int, int]) -> dict[str, Any]:
    """Compare gradients in float64, of an image in each process, with those of the first process on all of them."""
    images = torch.randn(processes, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shared, alone = (copy.deepcopy(model).double() for _ in range(2))
    for module in alone.modules():
        if isinstance(module, CPUSyncBatchNorm):
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    parallel = DistributedDataParallel(shared, broadcast_buffers=False)
    step(parallel, images[rank : rank + 1])
    found = {name.replace('module.', '', 1): grad for name, grad in step(parallel, images[rank : rank + 1]).items()}
    if rank:
        return {}
    deviates = deviation(found, step(alone, images))
    return {'passed': is_within(deviates, LIMIT), 'deviation': deviates, 'limit': LIMIT, 'size': list(size)}


def measure(task: dict[str, Any], processes: int) -> dict[str, Any]:
    """Return the row of a network on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (processes, task, folder), processes)
        row = json.loads(Path(folder, 'row.json').read_text())
    row |= {'name': f'{task["arch"]} on {processes}', 'task': task, 'threads': task['threads']}
    if not row['check']['passed']:
        del row['modes']  # wrong: no speed
    for mode in row.get('modes', {}).values() if task['rounds'] else ():
        mode['seconds'] = summary(mode['times'])
    return row


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.set_defaults(device='cpu', threads=1)
    parser.add_argument('--archs', nargs='+', default=['xt', 's'], choices=ARCHS, help='variants of the backbone')
    parser.add_argument('--processes', nargs='+', type=int, default=[2, 4], metavar='N', help='of a run')
    parser.add_argument('--size', type=size, default=(256, 256), metavar='HxW', help='of the images')
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images of a process')
    parser.add_argument('--check-size', type=size, default=(96, 96), metavar='HxW', help='of the images compared')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    rows = []
    for arch in args.archs:
        for processes in args.processes:
            task = {key: getattr(args, key) for key in ('size', 'batch', 'check_size', 'rounds', 'threads')}
            rows.append(measure({'arch': arch, **task}, processes))
            print(*(f'{key}: {rows[-1][key]}' for key in ('name', 'check', 'collectives', 'on_gpus')), sep='\n')
    write_result('scaling-' + '-'.join(args.archs), args, rows)
    return 0 if all(row['check']['passed'] for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
