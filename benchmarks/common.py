"""What every benchmark records beside its figures, and how it is written and shown."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
PACKAGES = ('torch', 'triton', 'natten', 'timm', 'numpy')


def machine(device: str, threads: int | None = None) -> dict[str, Any]:
    """The machine in words: processor, cores, threads of a worker, memory in bytes, and the GPU where it is used."""
    facts = {
        'device': device,
        'cpu': _cpu_name(),
        'cores': len(_cores()),
        'threads': threads or torch.get_num_threads(),
        'memory': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
        'system': platform.platform(),
    }
    if torch.device(device).type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            'gpu': properties.name,
            'gpu_memory': properties.total_memory,
            'cuda': torch.version.cuda,
            'cudnn': torch.backends.cudnn.version(),
        }
    return facts


def _cores() -> Iterable[int]:
    return os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else range(os.cpu_count() or 1)


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*:\s*(.+)', info.read_text()) if info.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f'{name} ({torch.backends.cpu.get_cpu_capability()})'


def versions() -> dict[str, str | None]:
    """Versions of Python and of what the figures depend on; None for what is not installed."""
    found: dict[str, str | None] = {'python': platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> dict[str, Any]:
    """The commit checked out and whether files differ from it; None where this is no git checkout."""

    def git(*command: str) -> str | None:
        try:
            run = subprocess.run(['git', *command], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    status = git('status', '--porcelain', '--untracked-files=no')
    return {'hash': git('rev-parse', 'HEAD'), 'dirty': None if status is None else bool(status)}


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles and number of times."""
    if len(seconds) < 2:
        return {'median': seconds[0], 'q1': seconds[0], 'q3': seconds[0], 'count': len(seconds)}
    q1, median, q3 = statistics.quantiles(seconds, n=4, method='inclusive')
    return {'median': median, 'q1': q1, 'q3': q3, 'count': len(seconds)}


def write_result(folder: str | os.PathLike, what: str, device: str, settings: dict, rows: list[dict]) -> Path:
    """Writes rows and all that they depend on to `<folder>/<what>-<device>-<date>.json`, whole or not at all."""
    facts = machine(device, next((row['threads'] for row in rows if 'threads' in row), None))
    now = datetime.datetime.now().astimezone().replace(microsecond=0)
    # Where the files lie is no matter of the figures.
    settings = {key: value for key, value in settings.items() if not isinstance(value, os.PathLike)}
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    record = {
        'what': what,
        'date': now.isoformat(),
        'command': shlex.join(['python', str(script), *sys.argv[1:]]),
        'machine': facts,
        'versions': versions(),
        'commit': commit(),
        'settings': settings,
        'rows': rows,
    }
    name = re.sub(r'[^a-z0-9]+', '-', (facts.get('gpu') or f'cpu {facts["cpu"]}').lower()).strip('-')
    path = Path(folder) / f'{what}-{name}-{now:%Y%m%dT%H%M%S}.json'
    text = json.dumps(_plain(record), indent=1, allow_nan=False)
    write_whole(path, lambda temporary: temporary.write_text(text + '\n'))
    return path


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path beside `path` and moves what it wrote there into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.stem}-', suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(temporary))
        # mkstemp's files are for their owner alone.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table; the first column is text, the others are figures."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # the figures need no more than torch
        print(title, '\t'.join(columns), *('\t'.join(row) for row in rows), sep='\n')
        return
    table = Table(title=title, title_justify='left', title_style='bold')
    for index, column in enumerate(columns):
        table.add_column(column, justify='right' if index else 'left', no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    # Without a terminal rich would cut lines at 80 columns.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def duration(seconds: float) -> str:
    """Seconds as text with a unit that suits, three digits."""
    for factor, unit in ((1, 's'), (1e3, 'ms')):
        if seconds * factor >= 1:
            return f'{seconds * factor:.3g} {unit}'
    return f'{seconds * 1e6:.3g} us'


def size(text: str) -> tuple[int, int]:
    """'800x1344' as (800, 1344), for argparse."""
    found = re.fullmatch(r'(\d+)x(\d+)', text)
    if not found:
        raise argparse.ArgumentTypeError(f'expected HEIGHTxWIDTH such as 800x1344, got {text!r}')
    return int(found[1]), int(found[2])


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options that all benchmarks share."""
    parser.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='cpu or cuda (default: cuda where there is one)',
    )
    parser.add_argument(
        '--rounds', type=int, default=7, metavar='N', help='how often each row gets its turn (default: %(default)s)'
    )
    parser.add_argument(
        '--turn-seconds',
        type=float,
        default=0.5,
        metavar='S',
        help='a turn repeats short iterations until this time has passed (default: %(default)s)',
    )
    parser.add_argument('--threads', type=int, metavar='N', help="threads of a worker (default: PyTorch's choice)")
    parser.add_argument(
        '--results', type=Path, default=RESULTS, metavar='DIR', help='folder of the JSON (default: %(default)s)'
    )
