"""The tables of docs/scaling.md: what `scaling.py` counted and measured, and from that an estimate for GPUs."""

import math
from collections.abc import Mapping
from itertools import pairwise, product
from typing import Any

from benchmarks.presets import is_beside
from benchmarks.record import latest, table
from benchmarks.rounds import is_timed

# Nominal, in bytes a second of a GPU and direction, by NVIDIA's data sheets: H100 and H200 (NVLink 4: 900 GB/s in both
# directions together), ConnectX-7 (NDR, 400 Gb/s) and ConnectX-6 (HDR, 200 Gb/s); one adapter for each of 8 GPUs.
NVLINK, ADAPTERS = 450e9, {'NDR': 50e9, 'HDR': 25e9}
NODE = 8
# Nominal, in seconds: latencies in NCCL's model of its own cost (src/graph/tuning.cc, protocol LL). A tree sums, a ring
# gathers and scatters; each has a call, a step over NVLink, a step over the network.
TREE, RING = (6.8e-6, 0.6e-6, 5.0e-6), (6.6e-6, 0.6e-6, 2.7e-6)


def estimate(row: Mapping[str, Any], gpus: int, adapter: str = '') -> dict[str, float]:
    """Estimate the seconds of a step that each kind of communication takes on GPUs; docs/scaling.md has the formulas.

    Args:
        row: Of `scaling.py`.
        gpus: Their number, 8 on a machine.
        adapter: A key of `ADAPTERS`, where there are several machines.
    """
    nodes = max(1, gpus // NODE)
    # Rings through all adapters of a machine share what enters and leaves it.
    bandwidth = NVLINK if nodes == 1 else min(NVLINK, NODE * ADAPTERS[adapter])
    tree = TREE[0] + 2 * ((min(gpus, NODE) - 1) * TREE[1] + math.log2(nodes) * TREE[2])
    ring = RING[0] + (gpus - nodes) * RING[1] + (nodes - 1) * RING[2]
    others = (gpus - 1) / gpus
    weights = 4 * row['parameters'] * others / bandwidth
    single, merged = row['on_gpus']['one by one'], row['on_gpus']['merged']
    gathered = (gpus - 1) * single['forward'] + 2 * others * single['backward']
    summed = 2 * others * (merged['forward'] + merged['backward'])
    return {
        'gradients': row['collectives']['gradients']['calls'] * tree + 2 * weights,
        # Weights are gathered block by block in the forward and in the backward pass, gradients scattered.
        'sharded': 3 * row['blocks'] * ring + 3 * weights,
        'statistics': single['pairs'] * (ring + tree) + gathered / bandwidth,
        'merged statistics': merged['pairs'] * 2 * tree + summed / bandwidth,
    }


def tables() -> dict[str, str]:
    """Return the tables by their names in the document."""
    rows = [row for record in latest('scaling-*.json') for row in filter(is_timed, record['rows'])]
    return {'table: sent': sent(rows), 'table: gpus': on_gpus(rows)}


def sent(rows: list[dict[str, Any]]) -> str:
    """Return what was counted and measured on CPUs."""
    columns = ['backbone', 'processes', 'gradients', 'share of a step', 'statistics', 'share of a step']
    lines = []
    for row in rows:
        alone, gradients, both = row['collectives'].values()
        cells = [row['task']['arch'].upper(), str(row['processes'])]
        medians = [mode.get('seconds', {}).get('median') for mode in row['modes'].values()]
        for (less, more), (before, after) in zip(pairwise((alone, gradients, both)), pairwise(medians), strict=True):
            calls, size = (more[key] - less[key] for key in ('calls', 'bytes'))
            cells += [f'{calls} calls, {size / 1e6:.2f} MB', f'{1 - before / after:.0%}' if after else 'not timed']
        lines.append(cells)
    return table(columns, lines)


def on_gpus(rows: list[dict[str, Any]]) -> str:
    """Return the estimate for GPUs."""
    columns = ['backbone', 'GPUs', 'gradients', 'FSDP', 'statistics', 'merged', 'first bottleneck', 'waits, of a step']
    lines = []
    for arch, row in {row['task']['arch']: row for row in rows}.items():
        for gpus, adapter in ((NODE, ''), *product((64, 256), ADAPTERS)):
            found = estimate(row, gpus, adapter)
            times = [f'{seconds * 1e3:.1f} ms' for seconds in found.values()]
            first = max('gradients', 'statistics', key=lambda name: found[name])
            cells = [arch.upper(), f'{gpus} {adapter}'.strip(), *times, first, waiting(arch, found)]
            lines.append(cells)
    return table(columns, lines)


def waiting(arch: str, found: Mapping[str, float]) -> str:
    """Return the share of a step that GPUs wait; `gpu.sh` measures the step of one, two images of 800x1344."""
    for record in latest(f'network-{arch}-train-2x3x800x1344-bf16-nvidia-*.json'):
        rows = [row for row in record['rows'] if is_timed(row) and not is_beside(row['name'])]
        times = [row['modes']['train']['seconds']['median'] for row in rows]
        # Gradients are sent during the rest of the backward pass, which is two thirds of a step.
        wait = found['statistics'] + max(0.0, found['gradients'] - min(times) * 2 / 3)
        return f'{wait / (min(times) + wait):.0%} of {(min(times) + wait) * 1e3:.0f} ms'
    return 'no step measured'
