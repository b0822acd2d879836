"""Shared by the tests of Triton kernels: where they run, and their compilation for GPUs that are not here."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from overlock.ops import gpu
from tests.testing import ROOT

needs_triton = pytest.mark.skipif(bool(gpu._missing()), reason=gpu._missing() or 'triton is here')
# Those that users have; the newest that the installed Triton knows comes on top.
CAPABILITIES = [80, 86, 89, 90]
# Bytes of shared memory of a program.
SHARED = 16 * 1024


def repair_interpreter(patch):
    """Let loops run: the interpreter has arrays of one element as bounds, which numpy 2.4 refuses as integers."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def repaired(tensor, *scope):
        original(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    patch.setattr(interpreter, '_patch_lang_tensor', repaired)


def newest() -> int:
    """Return the newest capability that Triton's assembler knows."""
    from triton.backends.nvidia.compiler import get_ptxas

    text = subprocess.run([get_ptxas(100).path, '--help'], capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"'sm_(\d+)'", text)))


def compile_kernels(capability: int, launch: Callable, shapes: list[tuple]) -> None:
    """Compile what `launch` launches for each shape, without a GPU.

    Print for each kernel its shape, name, size, shared memory, registers, and spilled bytes.
    """
    from triton import runtime
    from triton.backends.compiler import GPUTarget

    run_kernel, compiled = runtime.jit.JITFunction.run, {}

    class Driver:
        def get_current_target(self):
            return GPUTarget('cuda', capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    def run(self, *args, grid, warmup, **kwargs):
        kernel = run_kernel(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[shape, id(kernel)] = self.__name__, kernel

    runtime.driver.set_active(Driver())
    runtime.jit.JITFunction.run = run
    for shape in shapes:
        launch(shape)
    for (shape, _), (name, kernel) in compiled.items():
        sizes = len(kernel.asm['cubin']), kernel.metadata.shared
        print(json.dumps([shape, name, *sizes, *_registers_and_spills(kernel.asm['ptx'], capability)]))


def _registers_and_spills(ptx: str, capability: int) -> tuple[int, int]:
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    result = subprocess.run(
        [
            *(get_ptxas(capability).path, '-v', f'--gpu-name={sm_arch_from_capability(capability)}'),
            *('-o', os.devnull, '/dev/stdin'),
        ],
        input=ptx,
        text=True,
        capture_output=True,
        check=True,
    )
    patterns = r'Used (\d+) registers', r'(\d+) bytes spill'
    return tuple(int(re.search(pattern, result.stderr)[1]) for pattern in patterns)


def assert_compiles(module: str, capability: int, shapes: list[tuple], names: set[str], cache: str) -> None:
    """Compile in a process without the interpreter, and check that kernels keep to what a GPU has.

    Args:
        module: Name of the test module that has `launch`, for `compile_kernels`.
        capability, shapes: See `compile_kernels`.
        names: Kernels that every shape launches.
        cache: An empty folder.
    """
    code = (
        f'from tests.overlock.ops.triton_testing import compile_kernels; from {module} import launch; '
        f'compile_kernels({capability}, launch, {shapes!r})'
    )
    environ = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    result = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env=environ | dict(TRITON_CACHE_DIR=cache),
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    for shape in shapes:
        assert names <= {name for at, name, *_ in kernels if at == list(shape)}
    assert {name for _, name, *_ in kernels} - names <= {'pack'}
    for shape, name, size, shared, registers, spilled in kernels:
        assert size > 0 and 0 < registers <= 255 and shared <= SHARED, f'{name}: {shared} bytes shared for {shape}'
        assert spilled == 0, f'{name} spills {spilled} bytes for {shape}'
