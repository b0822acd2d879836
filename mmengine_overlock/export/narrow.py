"""Narrow an ONNX file to float16 or int8, in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from torch import Tensor

from mmengine_overlock.export.quiet import quiet

# What may compute in float16. Sums of squares over a map leave its range (GRN), and so do pixels of large images; boxes
# need more digits: all else, and of a detector whatever coordinates pass through, stays in float32.
_NARROW = {'Conv', 'ConvTranspose', 'Gemm', 'MatMul', 'Gelu', 'Relu'}
_NARROW_DENSE = _NARROW | {'Add', 'Mul', 'Concat', 'Slice', 'Transpose', 'Reshape', 'Split', 'Unsqueeze', 'Squeeze'}


def to_float16(path: Path, detector: bool) -> None:
    """Make weights, and the maps that can be, float16; inputs and outputs keep their types."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(path)
    allowed = _NARROW if detector else _NARROW_DENSE
    blocked = sorted({node.op_type for node in model.graph.node} - allowed)
    onnx.save(convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked), path)


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
