"""Run each row of a benchmark in a process of its own: check it first, then time all of them in turns.

A row measures a case, an object with `device`, `facts` (recorded with the row) and `run(**change)`, which runs one
iteration and returns outputs named 'output...' and gradients named 'gradient...'. `change` is what differs from how the
case was built.
"""

import argparse
import ctypes
import gc
import multiprocessing
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

# The first custom operator imports it, and torchvision, so timm, when it is imported: it belongs to the base.
import torch._dynamo  # noqa: F401
from safetensors.torch import load, save
from torch import Tensor

from overlock.utils.threads import wait_briefly

CONTEXT = multiprocessing.get_context('spawn')
# A gradient is compared relative to its norm, or to this share of the largest norm where that is more: the gradient of
# a bias before a BatchNorm is zero but for rounding.
GRADIENT_FLOOR = 1e-2
PROFILED_ITERATIONS = 20


class WorkerError(RuntimeError):
    """A worker process failed or died."""


class Host:
    """Build and measure the case of a worker process."""

    def build(self, make: Callable[..., Any], task: Mapping[str, Any], threads: int | None) -> dict[str, Any]:
        """Build the case, take the memory in use after that as the base, and return what the row records."""
        if threads:
            torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = True
        self.case = make(**task)
        self.cuda = self.case.device.type == 'cuda'
        self._give_back()
        self.base = self._memory()
        return {'threads': torch.get_num_threads(), 'facts': self.case.facts}

    def check(self, change: Mapping[str, Any]) -> bytes:
        """Return the outputs and gradients of one iteration without TF32, in the format of safetensors."""
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            results = self.case.run(**change)
        return save({name: x.detach().cpu().contiguous() for name, x in results.items()})

    def memory(self, change: Mapping[str, Any]) -> dict[str, int]:
        """Return the peak of an iteration after the first, in bytes: of the process, or of the allocator on a GPU."""
        self.case.run(**change)
        self._give_back()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            # Sets the high-water mark back to what is resident now.
            Path('/proc/self/clear_refs').write_text('5')
        before = self._memory()
        self.case.run(**change)
        peak = self._memory(peak=True)
        self._give_back()
        return {'base': self.base, 'peak': peak, 'above_base': peak - self.base, 'iteration': peak - before}

    def turn(self, seconds: float, change: Mapping[str, Any]) -> list[float]:
        """Return the seconds of each iteration; at least one runs, and others until `seconds` have passed."""
        if self.cuda:
            # The turn before this one ended by giving back all cached memory.
            self.case.run(**change)
        times: list[float] = []
        while sum(times) < seconds or not times:
            start = self._now()
            self.case.run(**change)
            times.append(self._now() - start)
        if self.cuda:  # on a CPU the next turn would pay for it with page faults
            self._give_back()
        return times

    def kernels(self, change: Mapping[str, Any]) -> float:
        """Return the seconds that GPU kernels take in an iteration, without the gaps between them."""
        self.case.run(**change)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(PROFILED_ITERATIONS):
                self.case.run(**change)
            torch.cuda.synchronize()
        events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(event.self_device_time_total for event in events) * 1e-6 / PROFILED_ITERATIONS

    def _now(self) -> float:
        # torch.utils.benchmark has such a timer, but its import needs setuptools.
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _give_back(self) -> None:
        """Give free memory back, so that a worker that waits leaves room for the others."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        else:
            ctypes.CDLL(None).malloc_trim(0)

    def _memory(self, peak: bool = False) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        field = 'VmHWM' if peak else 'VmRSS'
        return int(re.findall(rf'{field}:\s*(\d+)', Path('/proc/self/status').read_text())[0]) * 1024


# The one of this process.
HOST = Host()


def answer(method: str, *arguments: Any) -> Any:
    """Call a method of this process's host."""
    try:
        return getattr(HOST, method)(*arguments)
    except Exception as error:  # not all that a backend may raise can be sent to another process
        traceback.print_exc()
        raise WorkerError(f'{type(error).__name__}: {error}'.splitlines()[0]) from None


class Worker(ProcessPoolExecutor):
    """A process with a `Host` of its own; leaving its `with` block ends it."""

    def __init__(self) -> None:
        super().__init__(1, mp_context=CONTEXT)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the host and return its result.

        Raises:
            WorkerError: If the call raised or the process died.
        """
        try:
            return self.submit(answer, method, *arguments).result()
        except BrokenProcessPool:
            raise WorkerError('the worker process died, most often for lack of memory') from None

    def results(self, **change: Any) -> dict[str, Tensor]:
        """Return the outputs and gradients of one iteration."""
        return load(self.ask('check', change))


def compute_truth(make: Callable[..., Any], task: Mapping[str, Any], threads: int | None) -> dict[str, Tensor]:
    """Return the outputs and gradients of a case that is compared with others and not timed."""
    with Worker() as worker:
        worker.ask('build', make, task, threads)
        return worker.results()


def deviation(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the worst relative deviation of an output and of a gradient.

    An output deviates by its largest element, a gradient by its Euclidean norm. A tensor that is missing, of another
    shape or not finite deviates infinitely.
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


def is_within(found: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Return whether every deviation is known and within its limit."""
    return bool(limits) and all(found.get(kind, float('inf')) <= limit for kind, limit in limits.items())


def measure(
    make: Callable[..., Any],
    tasks: Mapping[str, Mapping[str, Any]],
    check: Callable[[dict[str, Any], Worker], dict[str, Any] | None],
    modes: Mapping[str, Mapping[str, Any]],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Check every task, then time in turns those that passed.

    Args:
        make: Builds a case in a worker.
        tasks: Keyword arguments of `make` by the name of the row.
        check: Returns {'passed': bool, ...} for a row and its worker; None if nothing can be compared.
        modes: What is timed, by name, as changes of the case.
        args: `device`, `rounds`, `turn_seconds` and `threads`; the options of `benchmarks.record.make_parser`.

    Returns:
        A row for each task: 'name', 'task', 'threads', 'facts', 'check', and 'modes' with 'memory', 'times', 'seconds'
        and on a GPU 'kernel_seconds' for each mode, or 'error'.
    """
    wait_briefly()
    rows: list[dict[str, Any]] = [{'name': name, 'task': dict(task)} for name, task in tasks.items()]
    workers = {}
    with ExitStack() as stack:
        for row in rows:
            print(f'{row["name"]}: checking')
            with _error_into(row):
                worker = workers[row['name']] = stack.enter_context(Worker())
                row |= worker.ask('build', make, row['task'], args.threads)
                row['check'] = check(row, worker)
                if row['check'] is None or row['check']['passed']:
                    row['modes'] = {
                        mode: {'memory': worker.ask('memory', change), 'times': []} for mode, change in modes.items()
                    }
        for turn in range(args.rounds):
            print(f'round {turn + 1} of {args.rounds}')
            for row in filter(is_timed, rows):
                with _error_into(row):
                    for mode, change in modes.items():
                        times = workers[row['name']].ask('turn', args.turn_seconds, change)
                        row['modes'][mode]['times'] += times
        for row in filter(is_timed, rows) if args.device.startswith('cuda') else ():
            with _error_into(row):
                for mode, change in modes.items():
                    row['modes'][mode]['kernel_seconds'] = workers[row['name']].ask('kernels', change)
    for row in filter(is_timed, rows):
        for result in row['modes'].values():
            result['seconds'] = summary(result['times'])
    return rows


@contextmanager
def _error_into(row: dict[str, Any]) -> Iterator[None]:
    """Record a worker's error in its row instead of raising it."""
    try:
        yield
    except WorkerError as error:
        row['error'] = str(error)
        print(f'{row["name"]}: {error}')


def is_timed(row: Mapping[str, Any]) -> bool:
    """Return whether a row was measured to the end."""
    return 'modes' in row and 'error' not in row


def summary(seconds: list[float]) -> dict[str, float | int]:
    """Return the median, the quartiles and the number of times."""
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    q1, median, q3 = torch.tensor(seconds, dtype=torch.float64).quantile(levels).tolist()
    return {'median': median, 'q1': q1, 'q3': q3, 'count': len(seconds)}
