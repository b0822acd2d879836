#!/usr/bin/env python
"""A process that holds one case and works when told to; started by rounds.py, speaks JSON lines.

A case is made by `build(**task)` of the module that the task names, and has `run(**change) -> dict[str, Tensor]`, one
iteration, whose outputs are named 'output...' and gradients 'gradient...', `clear()`, which drops what that left,
`device`, and `facts`, what the row should tell besides.
"""

import os
import sys

# This folder itself must not be on the path, where operator.py would hide Python's own module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import ctypes  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, TextIO  # noqa: E402

import torch  # noqa: E402

STATUS = Path('/proc/self/status')


class Worker:
    """Answers `build`, `check`, `memory`, `turn` and `kernels`."""

    def build(self, module: str, task: dict[str, Any]) -> dict:
        """Makes the case, and takes the memory after that as the base."""
        torch.backends.cudnn.benchmark = True
        self.case = importlib.import_module(module).build(**task)
        self.cuda = self.case.device.type == 'cuda'
        self.warm = set()
        self._settle()
        self.base = self._memory()
        return {'threads': torch.get_num_threads(), 'facts': self.case.facts}

    def check(self, file: str, change: dict[str, Any]) -> dict:
        """One iteration, without TF32; its outputs and gradients go into a file."""
        flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        results = {name: tensor.detach().cpu() for name, tensor in self.case.run(**change).items()}
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
        torch.save(results, file)
        del results
        if not self.cuda and self._is_measured(change):
            self.warm.add(json.dumps({}))
        self._settle()
        return {}

    def memory(self, change: dict[str, Any]) -> dict:
        """Peak of one iteration that is not the first, in bytes: of the process, or of the allocator on a GPU."""
        self._warm_up(change)
        self._settle()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif STATUS.exists():
            # Linux: sets the high-water mark back to what is resident now.
            Path('/proc/self/clear_refs').write_text('5')
        before = self._memory()
        self.case.run(**change)
        self._synchronize()
        peak = self._memory(peak=True)
        self._settle()
        return {'base': self.base, 'peak': peak, 'above_base': peak - self.base, 'iteration': peak - before}

    def turn(self, seconds: float, change: dict[str, Any]) -> dict:
        """Times iterations until `seconds` have passed, one at least."""
        self._warm_up(change)
        if self.cuda:
            # The turn before ended with all cached memory given back.
            self.case.run(**change)
        times: list[float] = []
        while not times or sum(times) < seconds:
            self._synchronize()
            start = time.perf_counter()
            self.case.run(**change)
            self._synchronize()
            times.append(time.perf_counter() - start)
        # The heap stays as it is on a CPU: handing it back would cost the next turn page faults.
        self._settle(trim=False)
        return {'seconds': times}

    def kernels(self, repeats: int = 20) -> dict:
        """Seconds that the GPU's kernels take in a forward and a backward pass, without the gaps between them."""
        return {name: self._kernel_seconds(function, repeats) for name, function in self.case.passes().items()}

    def _kernel_seconds(self, function: Any, repeats: int) -> float:
        function()
        self._synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(repeats):
                function()
            self._synchronize()
        events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(event.self_device_time_total for event in events) * 1e-6 / repeats

    def _warm_up(self, change: dict[str, Any]) -> None:
        key = json.dumps(change, sort_keys=True)
        if key not in self.warm:
            self.case.run(**change)
            self._synchronize()
            self.warm.add(key)

    def _is_measured(self, change: dict[str, Any]) -> bool:
        return all(
            getattr(self.case, key) == (tuple(value) if isinstance(value, list) else value)
            for key, value in change.items()
        )

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _settle(self, trim: bool = True) -> None:
        """Gives back what is free, so that workers that wait leave room for the others."""
        self.case.clear()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        elif trim and sys.platform == 'linux':
            trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # glibc's
            if trim is not None:
                trim(0)

    def _memory(self, peak: bool = False) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        if STATUS.exists():
            field = 'VmHWM:' if peak else 'VmRSS:'
            line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
            return int(line.split()[1]) * 1024
        # Elsewhere only the peak since the start is known, on macOS in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answers requests, one JSON object a line, until they end."""
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop('do'))(**request)
        except Exception as error:  # whatever a backend raises belongs into its row, and the other rows go on
            traceback.print_exc()
            reply = {'error': f'{type(error).__name__}: {error}'.splitlines()[0]}
        replies.write(json.dumps(reply) + '\n')
        replies.flush()


if __name__ == '__main__':
    # Libraries may print; only replies may reach the parent.
    channel = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    serve(sys.stdin, channel)
