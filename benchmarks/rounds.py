"""Workers that take turns: each row of a benchmark in a process of its own, checked first, then timed in rounds."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import summary

# A gradient is compared relative to its norm, but at least to this share of the largest norm of all: that of a bias
# before a BatchNorm is zero but for rounding.
GRADIENT_FLOOR = 1e-2


class WorkerError(RuntimeError):
    """What a worker could not do."""


class Remote:
    """A worker process and the line to it.

    Args:
        module: Module with `build`.
        task: Its arguments.
        threads: Threads of the process, or None for PyTorch's choice.
    """

    def __init__(self, module: str, task: Mapping[str, Any], threads: int | None = None) -> None:
        # OpenMP's threads would spin while another worker has its turn.
        env = {'OMP_WAIT_POLICY': 'PASSIVE', **os.environ}
        if threads:
            env['OMP_NUM_THREADS'] = str(threads)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name('worker.py'))],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.module, self.task = module, dict(task)

    def __enter__(self) -> 'Remote':
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self.process.kill()
        self.close()

    def close(self) -> None:
        """Ends the process: by itself where it waits for a request, by force where it does not end soon."""
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def build(self) -> dict[str, Any]:
        """Makes the case there."""
        return self.ask('build', module=self.module, task=self.task)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its reply.

        Raises:
            WorkerError: If the worker could not do it, or is gone.
        """
        try:
            self.process.stdin.write(json.dumps({'do': do, **arguments}) + '\n')
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ''
        if not line:
            status = self.process.wait()
            why = ' (killed, most often for memory)' if status == -9 else ''
            raise WorkerError(f'the worker ended with status {status}{why}')
        reply = json.loads(line)
        if 'error' in reply:
            raise WorkerError(reply['error'])
        return reply

    def results(self, folder: Path, change: Mapping[str, Any]) -> dict[str, Tensor]:
        """Outputs and gradients of one iteration."""
        file = folder / f'{id(self)}.pt'
        self.ask('check', file=str(file), change=dict(change))
        found = torch.load(file)
        file.unlink()
        return found


def deviation(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """The worst deviation of an output, by its largest element, and of a gradient, by its Euclidean norm; relative.

    A tensor that is missing, of another shape or not finite deviates infinitely.
    """
    found = {}
    for kind, order, floor in (('output', float('inf'), 0.0), ('gradient', 2.0, GRADIENT_FLOOR)):
        wanted = {name: tensor for name, tensor in truth.items() if name.startswith(kind)}
        sizes = {name: torch.linalg.vector_norm(tensor, order).item() for name, tensor in wanted.items()}
        if wanted:
            least = max(floor * max(sizes.values()), 1e-300)
            found[kind] = max(
                _distance(results.get(name), tensor, order) / max(sizes[name], least) for name, tensor in wanted.items()
            )
    return found


def _distance(actual: Tensor | None, expected: Tensor, order: float) -> float:
    if actual is None or actual.shape != expected.shape or not actual.isfinite().all():
        return float('inf')
    return torch.linalg.vector_norm(actual.to(expected.dtype) - expected, order).item()


def may_be_timed(found: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """The gate: whether every deviation is known and within its limit."""
    return bool(limits) and all(found.get(kind, float('inf')) <= limit for kind, limit in limits.items())


def measure(
    module: str,
    tasks: Mapping[str, Mapping[str, Any]],
    gate: Callable[[str, Remote, Path], dict | None],
    modes: Mapping[str, Mapping[str, Any]],
    rounds: int,
    turn_seconds: float,
    threads: int | None = None,
    kernels: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Checks every task, and then times those that passed, in turns.

    Args:
        module: Module whose `build(**task)` makes a case.
        tasks: Arguments of `build` by the row's name.
        gate: Given name, worker and a folder for files; returns {'passed': bool, ...}, or None for a row that
            there is nothing to compare with.
        modes: What is timed, by name: the changes for the case's `run`.
        rounds: Turns of each row.
        turn_seconds: Least length of a turn, in seconds.
        threads: Threads of a worker.
        kernels: Whether to ask for the time in GPU kernels too.
        say: Called with a line about what happens now.

    Returns:
        A row for each task: 'name', 'task', 'check', and 'error' or for each mode {'seconds', 'memory', 'times'}.
    """
    rows = [{'name': name, 'task': dict(task)} for name, task in tasks.items()]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='overlock-benchmark-')))
        timed = []
        for row in rows:
            say(f'{row["name"]}: checking')
            worker = stack.enter_context(Remote(module, row['task'], threads))
            if _attempt(row, say, lambda row=row, worker=worker: _prepare(row, worker, gate, modes, folder)):
                timed.append((row, worker))
            else:
                worker.close()
        for turn in range(rounds):
            say(f'round {turn + 1} of {rounds}')
            for row, worker in timed:
                if 'error' not in row:
                    _attempt(row, say, lambda row=row, worker=worker: _take_turn(row, worker, modes, turn_seconds))
        for row, worker in timed:
            if kernels and 'error' not in row:
                _attempt(row, say, lambda row=row, worker=worker: row.update(kernel_seconds=worker.ask('kernels')))
    for row in rows:
        for result in row.get('modes', {}).values():
            if 'error' not in row:
                result['seconds'] = summary(result['times'])
    return rows


def _attempt(row: dict[str, Any], say: Callable[[str], None], work: Callable[[], bool | None]) -> bool:
    """Whether `work` was done and did not answer no; a worker's error goes into the row."""
    try:
        return work() is not False
    except WorkerError as error:
        row['error'] = str(error)
        say(f'{row["name"]}: {error}')
        return False


def _prepare(row: dict[str, Any], worker: Remote, gate: Callable, modes: Mapping, folder: Path) -> bool:
    """Builds and checks, and measures the memory of what passed."""
    row |= worker.build()
    row['check'] = gate(row['name'], worker, folder)
    if row['check'] is not None and not row['check']['passed']:
        return False
    row['modes'] = {
        mode: {'memory': worker.ask('memory', change=dict(change)), 'times': []} for mode, change in modes.items()
    }
    return True


def _take_turn(row: dict[str, Any], worker: Remote, modes: Mapping, seconds: float) -> None:
    for mode, change in modes.items():
        row['modes'][mode]['times'] += worker.ask('turn', seconds=seconds, change=dict(change))['seconds']
