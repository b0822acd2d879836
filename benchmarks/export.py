#!/usr/bin/env python
"""Time exported networks in onnxruntime, and in OpenVINO where it is installed, beside the deploy form in PyTorch.

For each variant and size the rows take turns, each in a process of its own. A row that deviates from PyTorch in float64
gets no speed. Needs the extra `export`.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.presets import NetworkCase, outputs
from benchmarks.record import make_parser, show, size, write_result
from benchmarks.rounds import Worker, compute_truth, deviation, is_timed, is_within, measure
from mmengine_overlock.export.checks import open_onnx, open_openvino
from mmengine_overlock.export.graph import to_openvino, trace, write_onnx
from mmengine_overlock.export.modules import Outputs
from mmengine_overlock.export.subjects import MEAN, STD, Subject
from overlock import ARCHS

# Relative, in float32.
TOLERANCE = 1e-4
# Suffix of the files, and what opens them.
RUNTIMES = {'onnxruntime': ('.onnx', open_onnx), 'openvino': ('.xml', open_openvino)}


class ExportedCase:
    """One exported network at one size; see `benchmarks.rounds`.

    Args:
        runtime: A name of `RUNTIMES`.
        file: The exported file.
        size: Height and width of the image.
    """

    device = torch.device('cpu')

    def __init__(self, runtime: str, file: str, size: tuple[int, int]) -> None:
        # OpenVINO's weights are in a file of their own, beside the ONNX file.
        suffixes = ('.xml', '.bin') if runtime == 'openvino' else ('.onnx',)
        self.facts = {'bytes': sum(Path(file).with_suffix(suffix).stat().st_size for suffix in suffixes)}
        self._run = RUNTIMES[runtime][1](Path(file))
        self._image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))

    def run(self) -> dict[str, Tensor]:
        """Run one iteration, on the image of `NetworkCase`."""
        return outputs(self._run(self._image))


def make(preset: str, **task: Any) -> NetworkCase | ExportedCase:
    """Build the case of a row."""
    return NetworkCase(preset=preset, **task) if preset == 'deploy' else ExportedCase(**task)


def write_files(folder: Path, task: dict[str, Any], forms: list[str], runtimes: list[str]) -> dict[str, dict[str, Any]]:
    """Export a network in each form, and return the tasks of the rows by name."""
    case = NetworkCase(preset='deploy', **task)
    names = ('logits',) if task['network'] == 'classifier' else ('stride4', 'stride8', 'stride16', 'stride32')
    info = {'mean': MEAN, 'std': STD}
    subject = Subject(task['network'], Outputs(case.model).eval(), names, 33, info=info)
    tasks = {}
    for form in forms:
        onnx = folder / f'{task["arch"]}-{task["network"]}-{form}-{task["size"]}.onnx'
        write_onnx(trace(subject, task['size'] if form == 'fixed' else None), subject, onnx)
        for runtime in runtimes:
            file = onnx.with_suffix(RUNTIMES[runtime][0])
            if runtime == 'openvino':
                to_openvino(onnx, file)
            tasks[f'{runtime} {form}'] = {
                'preset': 'exported', 'runtime': runtime, 'file': str(file), 'size': task['size']
            }  # fmt: skip
    return tasks


def make_check(task: dict[str, Any], threads: int | None) -> Callable[[dict[str, Any], Worker], dict[str, Any]]:
    """Return the check of rows against PyTorch in float64 on the same weights and image."""
    exact = compute_truth(NetworkCase, {**task, 'preset': 'deploy', 'dtype': 'fp64'}, threads)

    def check(row: dict[str, Any], worker: Worker) -> dict[str, Any]:
        found, limit = deviation(worker.results(), exact), {'output': TOLERANCE}
        return {'passed': is_within(found, limit), 'deviation': found, 'limit': limit}

    return check


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('--archs', nargs='+', default=['xt', 's'], choices=ARCHS, help='variants')
    sizes = 'the classifier at 224x224, else the dense-prediction backbone'
    parser.add_argument('--sizes', nargs='+', type=size, default=[(224, 224), (800, 1344)], metavar='HxW', help=sizes)
    forms = 'one file for every size, one for the size at hand'
    parser.add_argument('--forms', nargs='+', default=['dynamic', 'fixed'], choices=['dynamic', 'fixed'], help=forms)
    args = parser.parse_args()
    args.device = 'cpu'
    return args


def main() -> int:
    args = parse_args()
    runtimes = [name for name in RUNTIMES if importlib.util.find_spec(name)]
    rows = []
    for arch in args.archs:
        for side in args.sizes:
            network = 'classifier' if side == (224, 224) else 'backbone'
            task = dict(
                arch=arch, network=network, mode='forward', size=side, batch=1, dtype='fp32', device=args.device
            )
            what = f'{arch} 1x3x{side[0]}x{side[1]}'
            with tempfile.TemporaryDirectory() as folder:
                print(f'{what}: exporting')
                tasks = {'deploy': {'preset': 'deploy', **task}}
                tasks |= write_files(Path(folder), task, args.forms, runtimes)
                found = measure(make, tasks, make_check(task, args.threads), {'forward': {}}, args)
            show(what, found)
            rows += [row | {'arch': arch, 'image': list(side)} for row in found]
    write_result('export-' + '-'.join(args.archs), args, rows)
    return 0 if all(map(is_timed, rows)) else 1


if __name__ == '__main__':
    sys.exit(main())
