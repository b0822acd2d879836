"""Options that the benchmarks share, the JSON that they write, and the tables that they print."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import is_timed
from overlock.utils.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
PACKAGES = ('torch', 'triton', 'natten', 'timm', 'mmcv', 'mmdet', 'mmsegmentation', 'numpy', 'onnxruntime', 'openvino')
# What only some benchmarks add to the figures of a mode.
EXTRA = ('kernel_seconds', 'images_per_second', 'speedup', 'memory_ratio')


def size(text: str) -> tuple[int, int]:
    """Parse '800x1344' as (800, 1344), for argparse."""
    found = re.fullmatch(r'(\d+)x(\d+)', text)
    if not found:
        raise argparse.ArgumentTypeError(f'expected HEIGHTxWIDTH such as 800x1344, got {text!r}')
    return int(found[1]), int(found[2])


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all benchmarks share; its help gives the defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--device', default=device, help='cpu or cuda')
    parser.add_argument('--rounds', type=int, default=7, metavar='N', help='turns of each row')
    parser.add_argument('--turn-seconds', type=float, default=0.5, metavar='S', help='least length of a turn')
    parser.add_argument('--threads', type=int, metavar='N', help="threads of a worker; None is PyTorch's choice")
    parser.add_argument('--results', type=Path, default=RESULTS, metavar='DIR', help='folder of the JSON')
    return parser


def write_result(what: str, args: argparse.Namespace, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """Write rows and all that they depend on to `<args.results>/<what>-<device>-<date>.json` and return that path."""
    found = {name: next(iter(importlib.metadata.distributions(name=name)), None) for name in PACKAGES}
    threads = next((row['threads'] for row in rows if 'threads' in row), None)
    machine = describe_machine(args.device, threads)
    changes = _git('status', '--porcelain', '--untracked-files=no')
    now = datetime.datetime.now().astimezone().replace(microsecond=0)
    record = {
        'what': what,
        'date': now.isoformat(),
        'command': shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]]),
        'machine': machine,
        'versions': {'python': platform.python_version()}
        | {name: package.version if package else None for name, package in found.items()},
        'commit': {'hash': _git('rev-parse', 'HEAD'), 'dirty': None if changes is None else bool(changes)},
        # Paths say nothing about the figures.
        'settings': {key: value for key, value in vars(args).items() if not isinstance(value, Path)} | settings,
        'rows': rows,
    }
    device = re.sub(r'[^a-z0-9]+', '-', (machine.get('gpu') or f'cpu {machine["cpu"]}').lower()).strip('-')
    path = args.results / f'{what}-{device}-{now:%Y%m%dT%H%M%S}.json'
    # JSON has no infinite deviations; they become null.
    record = json.loads(json.dumps(record), parse_constant=lambda name: None)
    with whole_file(path) as file:
        file.write((json.dumps(record, indent=1) + '\n').encode())
    print(path)
    return path


def latest(pattern: str) -> list[dict[str, Any]]:
    """Return the newest result in `RESULTS` whose file fits a pattern; empty where there is none."""
    found = sorted(RESULTS.glob(pattern), key=lambda path: path.stem.rpartition('-')[2])
    return [json.loads(path.read_text()) for path in found[-1:]]


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; without lines, a sentence."""
    cells = [columns, ['---'] * len(columns), *lines]
    return ''.join(f'| {" | ".join(line)} |\n' for line in cells) if lines else 'Not measured yet.\n'


def describe_machine(device: str, threads: int | None) -> dict[str, Any]:
    """Return processor, cores, threads of a worker and memory in bytes, and the GPU if it is used."""
    names = re.findall(r'model name\s*:\s*(.+)', Path('/proc/cpuinfo').read_text())
    facts = {
        'device': device,
        'cpu': f'{next(iter(names), platform.machine())} ({torch.backends.cpu.get_cpu_capability()})',
        'cores': len(os.sched_getaffinity(0)),
        'threads': threads or torch.get_num_threads(),
        'memory': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
        'system': platform.platform(),
    }
    if device.startswith('cuda'):
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            'gpu': properties.name,
            'gpu_memory': properties.total_memory,
            'cuda': torch.version.cuda,
            'cudnn': torch.backends.cudnn.version(),
        }
    return facts


def _git(*command: str) -> str | None:
    """Return what git prints; None where this is no git checkout."""
    try:
        return subprocess.check_output(['git', *command], cwd=ROOT, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of `benchmarks.rounds.measure`: a line for each row, or why it has no figures."""
    lines = [_cells(row) for row in rows]
    columns = [*dict.fromkeys(column for line in lines for column in line)]
    table = [columns, *([line.get(column, '') for column in columns] for line in lines)]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    print(f'\n{title}')
    for cells in table:
        print('  '.join(map(str.ljust, cells, widths)).rstrip())


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    cells = {'row': row['name']}
    if row.get('check'):
        found = row['check']['deviation'].values()
        # Networks have deviations for each dtype.
        worst = max(value for entry in found for value in (entry.values() if isinstance(entry, dict) else [entry]))
        cells['deviation'] = f'{worst:.1e}'
    if not is_timed(row):
        return cells | {'note': row.get('error', 'wrong: no speed')}
    for mode, result in row['modes'].items():
        median, q1, q3 = (f'{result["seconds"][key] * 1e3:.4g}' for key in ('median', 'q1', 'q3'))
        cells |= {f'{mode} ms': median, f'{mode} quartiles': f'{q1} - {q3}'}
        cells |= {f'{mode} MiB {key}': f'{result["memory"][key] / 2**20:.1f}' for key in ('above_base', 'iteration')}
        cells |= {f'{mode} {key}': f'{result[key]:.3g}' for key in EXTRA if key in result}
    return cells
