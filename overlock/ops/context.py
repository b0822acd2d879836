"""What surrounds a call: graphs being made of it, and autocast."""

import torch
from torch import Tensor


def is_exporting() -> bool:
    """Whether a graph is being made for elsewhere, by `torch.export`, for ONNX or by tracing."""
    # PyTorch has is_exporting() from 2.7 on, and torch.compile takes it for true while it traces.
    exporting = getattr(torch.compiler, 'is_exporting', bool)() and not torch.compiler.is_dynamo_compiling()
    return exporting or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def is_eager() -> bool:
    """Whether operations run as they are called, and no graph is made of them."""
    return not torch.compiler.is_compiling() and not is_exporting()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of `x` computes in: autocast's where it is on and `x` is no float64."""
    kind = x.device.type
    narrows = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if narrows else x.dtype
