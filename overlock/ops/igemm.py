"""Depthwise convolution by implicit matrix products on CUDA: `depthwise_conv2d_implicit_gemm`, if asked for.

That package comes with RepLKNet (its fork of CUTLASS) and has to be compiled by hand; `OVERLOCK_IGEMM=1` in the
environment asks for it. The one file that imports it.
"""

import importlib
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from overlock.ops.context import compute_dtype

PACKAGE = 'depthwise_conv2d_implicit_gemm'
ASKED = os.environ.get('OVERLOCK_IGEMM') == '1'
# Its autograd functions, by the dtype that they take.
FUNCTIONS = {torch.float32: '_DepthWiseConv2dImplicitGEMMFP32', torch.float16: '_DepthWiseConv2dImplicitGEMMFP16'}
# PyTorch has kernels of its own for the smaller ones.
MIN_KERNEL = 7


@cache
def package() -> ModuleType:
    """The package.

    Raises:
        RuntimeError: If it was asked for and cannot be imported.
    """
    try:
        return importlib.import_module(PACKAGE)
    except ImportError as error:
        raise RuntimeError(
            f'OVERLOCK_IGEMM=1 asks for the package {PACKAGE}, which does not import here ({error}); '
            'compile it for this PyTorch, or unset the variable'
        ) from error


def fits(x: Tensor, weight: Tensor, dilation: int) -> bool:
    """Whether it is asked for and has a kernel for these inputs: large and undilated, float32 or float16 on CUDA."""
    return (
        ASKED
        and x.device.type == 'cuda'
        and compute_dtype(x) in FUNCTIONS
        and dilation == 1
        and weight.shape[-1] >= MIN_KERNEL
    )


def depthwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """(B, C, H, W) and (C, 1, K, K) to (B, C, H, W); see `fits`."""
    dtype = compute_dtype(x)
    function = getattr(package(), FUNCTIONS[dtype])
    return function.apply(x.to(dtype).contiguous(), weight.to(dtype).contiguous())
