"""Narrow an ONNX file to float16 or int8, in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from torch import Tensor

from mmengine_overlock.quiet import quiet

# The second input of these is a weight, and nearly all of a file.
_WEIGHTED = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')


def to_float16(path: Path) -> None:
    """Store the weights of convolutions and matrix products in float16; runtimes widen them when they load the file."""
    model = onnx.load(path)
    graph = model.graph
    used = {node.input[1] for node in graph.node if node.op_type in _WEIGHTED}
    casts = []
    for weight in graph.initializer:
        if weight.name in used and weight.data_type == onnx.TensorProto.FLOAT:
            name, narrow = weight.name, f'{weight.name}.float16'
            values = onnx.numpy_helper.to_array(weight).astype(np.float16)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, narrow))
            casts.append(onnx.helper.make_node('Cast', [narrow], [name], f'cast.{name}', to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)


def to_int8(path: Path, images: Sequence[Tensor]) -> None:
    """Make convolutions compute in int8, with ranges from some images (static quantization, a scale a channel)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict | None:
            image = next(self.left, None)
            return None if image is None else {'image': image.numpy()}

    before = path.with_name(f'float.{path.name}')
    path.rename(before)
    with quiet():
        quantize_static(
            before,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=['Conv'],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    before.unlink()
