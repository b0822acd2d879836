"""Trace a module for every size, and write it as an ONNX file.

By torch.export, whose programs are a format of their own: one graph, with symbols for the sizes, serves all formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mmengine_overlock.export.subjects import Subject
from mmengine_overlock.quiet import quiet
from overlock.models.network import Network
from overlock.ops.resize import adaptive_avg_pool2d

# Larger sides and batches run, but were not asked of the tracing.
MOST, MOST_IMAGES = 16384, 1024


class _Sizeless(TorchFunctionMode):
    """Replace operations of the toolboxes that take sizes for constants, by ones that give the same for every size.

    Conversions to the dtype that a tensor has are left out.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # Each would be three nodes, to be traced and removed again.
        if func is torch.Tensor.to and len(args) == 2 and not kwargs and args[1] is args[0].dtype:
            return args[0]
        if func is F.adaptive_avg_pool2d and len(args) == 2:
            size = args[1] if isinstance(args[1], (list, tuple)) else (args[1], args[1])
            if None not in size:
                return adaptive_avg_pool2d(args[0], tuple(size))
        # FPN's extra level: a window of one pixel.
        if func in _MAX_POOLS and len(args) == 2 and args[1] == 1 and not kwargs.get('padding'):
            stride = kwargs['stride']
            return args[0][..., ::stride, ::stride]
        return func(*args, **kwargs)


# The name is a choice between two functions.
_MAX_POOLS = (F.max_pool2d, F._max_pool2d)  # type: ignore[attr-defined]


def trace(subject: Subject, size: tuple[int, int] | None) -> torch.export.ExportedProgram:
    """Trace a network.

    Args:
        subject: The network.
        size: Height and width of the one image that it will take; None for every batch, height and width.
    """
    batch, height, width = (1, *size) if size else (2, max(2 * subject.least, 160), max(2 * subject.least, 160) + 32)
    free = None
    if size is None:
        sides = {
            axis: torch.export.Dim(name, min=subject.least, max=MOST) for axis, name in ((2, 'height'), (3, 'width'))
        }
        free = ({0: torch.export.Dim('batch', min=1, max=MOST_IMAGES), **sides},)
    with _contiguous(subject.module), quiet(), torch.no_grad(), _Sizeless():
        return torch.export.export(
            subject.module, (subject.example(batch, height, width),), dynamic_shapes=free, strict=False
        )


@contextmanager
def _contiguous(module: torch.nn.Module) -> Iterator[None]:
    """Keep networks from changing the memory format: it is not the graph's to choose."""
    networks = [part for part in module.modules() if isinstance(part, Network)]
    before = [network.memory_format for network in networks]
    for network in networks:
        network.memory_format = torch.contiguous_format
    try:
        yield
    finally:
        for network, memory_format in zip(networks, before, strict=True):
            network.memory_format = memory_format


def write_onnx(program: torch.export.ExportedProgram, subject: Subject, path: Path) -> int:
    """Write a traced network as an ONNX file, with what is known of it in the metadata as JSON.

    Returns:
        The number of nodes.
    """
    import onnx_ir.passes.common as passes
    from onnx_ir.passes import Sequential
    from onnxscript.optimizer import fold_constants_ir

    with quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            # Its rewriting rules look at the whole graph for each node: most of the time goes into them, and runtimes
            # have rules of their own.
            optimize=False,
            input_names=['image'],
            output_names=subject.outputs,
            verbose=False,
        )
        assert converted is not None
        model = converted.model
        shrink = (
            passes.IdentityEliminationPass(),
            passes.CommonSubexpressionEliminationPass(),
            passes.RemoveUnusedNodesPass(),
        )
        Sequential(passes.InlinePass(), *shrink)(model)
        fold_constants_ir(model)
        Sequential(
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.DeduplicateInitializersPass(),
            *shrink,
            passes.OutputFixPass(),
            passes.NameFixPass(),
        )(model)
        for node in model.graph:
            node.metadata_props.clear()
        model.metadata_props.clear()
        model.metadata_props.update({name: _text(value) for name, value in metadata(subject).items()})
        converted.save(path)
    return len(list(model.graph))


def to_openvino(onnx: Path, out: Path) -> None:
    """Write an ONNX file as OpenVINO's pair of files, .xml and .bin, in float32."""
    import openvino

    # convert_model takes a path with a comma for two.
    openvino.save_model(openvino.Core().read_model(onnx), out, compress_to_fp16=False)


def metadata(subject: Subject) -> dict[str, Any]:
    """Return what a program that runs the file has to know."""
    return {'task': subject.kind, 'outputs': list(subject.outputs), **subject.info}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
