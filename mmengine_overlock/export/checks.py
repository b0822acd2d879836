"""Run an exported file beside PyTorch, and compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from mmengine_overlock.export.subjects import Subject
from mmengine_overlock.predict.exported import open_session
from mmengine_overlock.quiet import quiet
from overlock.utils.errors import UserError

Run = Callable[[Tensor], Sequence[Tensor]]

# Two boxes of one object: how much they overlap at least, and how far apart their scores may be.
IOU, SCORE = 0.9, 1e-2


@dataclass(frozen=True)
class Limits:
    """What an exported file may differ by.

    Attributes:
        maps: Of each output, relative to its largest value.
        share: Of detections that must be the same, or pixels of the same label: a tie may tip by rounding.
    """

    maps: float = 1e-3
    share: float = 0.98


@dataclass
class Row:
    """One comparison.

    Attributes:
        what: The size, or the size and the image.
        difference: The largest of all outputs, relative to the largest value of each; of detectors, of the boxes that
            are the same, in pixels.
        same: How many detections, labels or best classes are the same, and of how many; of maps None.
        exported_ms, pytorch_ms: The least time of up to four runs.
    """

    what: str
    difference: float
    same: tuple[int, int] | None
    exported_ms: float
    pytorch_ms: float

    def fits(self, kind: str, limits: Limits) -> bool:
        """Return whether the outputs agree."""
        share = self.same is None or self.same[0] >= limits.share * self.same[1]
        return share and (kind == 'detector' or self.difference <= limits.maps)


@dataclass
class Report:
    """The comparisons of one file.

    Attributes:
        runtime: What ran the file.
        unit: Of the differences.
        rows: The comparisons.
    """

    runtime: str
    unit: str
    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        heads = ['image', f'difference ({self.unit})', 'the same', f'{self.runtime} ms', 'PyTorch ms']
        lines = [heads]
        for row in self.rows:
            same = '' if row.same is None else f'{row.same[0]} of {row.same[1]}'
            lines.append([row.what, f'{row.difference:.1e}', same, f'{row.exported_ms:.0f}', f'{row.pytorch_ms:.0f}'])
        empty = ', '.join(row.what for row in self.rows if row.same == (0, 0))
        told = f'\nNothing was detected at {empty}, so nothing was compared there; give images with objects.'
        return align(lines) + told * bool(empty)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as a table."""
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue='')]
    return '\n'.join('  '.join(map(str.ljust, line, widths)).rstrip() for line in lines)


def open_onnx(path: Path) -> Run:
    """Open an ONNX file in onnxruntime, on the CPU, with as many threads as PyTorch has."""
    session = open_session(path)
    return lambda image: [torch.from_numpy(out) for out in session.run(None, {'image': image.numpy()})]


def open_program(path: Path) -> Run:
    """Open a file of torch.export."""
    with quiet():
        return torch.export.load(path).module()


def open_openvino(path: Path) -> Run:
    """Open an OpenVINO model on the CPU."""
    import openvino

    settings = {'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'INFERENCE_PRECISION_HINT': 'f32'}
    model = openvino.Core().compile_model(path, 'CPU', settings)
    return lambda image: [torch.from_numpy(model(image.numpy())[out].copy()) for out in model.outputs]


@torch.no_grad()
def compare(run: Run, runtime: str, subject: Subject, images: Sequence[tuple[str, Tensor]]) -> Report:
    """Compare an exported network with PyTorch's deploy form.

    Args:
        run: The exported network.
        runtime: The name of what runs it.
        subject: The network.
        images: Named inputs.
    """
    report = Report(runtime, 'pixels' if subject.kind == 'detector' else 'of the largest')
    for name, image in images:
        outs, exported_ms = _timed(run, image)
        expected, pytorch_ms = _timed(subject.module, image)
        rows = (f'{image.shape[2]}x{image.shape[3]}' + f' x{len(image)}' * (len(image) > 1) + f' {name}').strip()
        if subject.kind == 'detector':
            difference, same = _compare_batches(outs, expected, image, subject)
        elif expected[0].dtype == torch.int64:
            difference, same = 0.0, _count_equal(outs[0], expected[0])
        else:
            difference, same = max(_relative(*pair) for pair in zip(outs, expected, strict=True)), None
            if subject.kind != 'backbone':
                same = _count_equal(outs[0].argmax(1), expected[0].argmax(1))
        report.rows.append(Row(rows, difference, same, exported_ms, pytorch_ms))
    return report


def require(report: Report, subject: Subject, limits: Limits, out: Path) -> None:
    """Refuse a file that does not agree.

    Raises:
        UserError: With the first comparison that failed.
    """
    for row in report.rows:
        if not row.fits(subject.kind, limits):
            same = f', {row.same[0]} of {row.same[1]} the same' if row.same else ''
            raise UserError(
                f'{out} was not written: at {row.what} {report.runtime} gives something else than PyTorch (difference '
                f'{row.difference:.1e} {report.unit}{same}), expected at most {limits.maps:.0e} or a share of '
                f'{limits.share}; check that the weights are finite, or export another format'
            )


def _timed(run: Run, image: Tensor, enough: float = 1.0) -> tuple[Sequence[Tensor], float]:
    """Return the outputs, and the milliseconds of the fastest of some runs: one where it takes long."""
    times: list[float] = []
    while sum(times) < enough and len(times) < 4:
        start = time.perf_counter()
        outs = run(image)
        times.append(time.perf_counter() - start)
    return outs, 1000 * min(times)


def _relative(out: Tensor, expected: Tensor) -> float:
    if out.shape != expected.shape:
        return float('inf')
    deviation = ((out - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    return deviation if deviation == deviation else float('inf')


def _count_equal(out: Tensor, expected: Tensor) -> tuple[int, int]:
    return (int((out == expected).sum()) if out.shape == expected.shape else 0), expected.numel()


def _compare_batches(
    outs: Sequence[Tensor], expected: Sequence[Tensor], image: Tensor, subject: Subject
) -> tuple[float, tuple[int, int]]:
    """Compare detections of the graph with those of our module, and of the first image with mmdet's own."""
    pairs = [(tuple(out[i] for out in outs), tuple(out[i] for out in expected)) for i in range(len(image))]
    if subject.reference is not None and len(image) == 1:
        pairs.append((pairs[0][0][:3], subject.reference(image)))
    counts = [compare_detections(*pair) for pair in pairs]
    return max(count[0] for count in counts), (sum(count[1] for count in counts), sum(count[2] for count in counts))


def compare_detections(found: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[float, int, int]:
    """Compare the detections in one image, in any order.

    Args:
        found, truth: Boxes (N, 4), scores (N,), below 0 for none, labels (N,), and perhaps masks (N, M, M).

    Returns:
        The largest difference of the boxes that are the same, in pixels; how many are the same; how many there are.
        The same are those of one label, that overlap by an IoU of at least 0.9, with scores and masks within 0.01.
    """
    found, truth = (tuple(part[side[1] >= 0] for part in side) for side in (found, truth))
    if not len(found[1]) or not len(truth[1]):
        return 0.0, 0, max(len(found[1]), len(truth[1]))
    same = (found[2][:, None] == truth[2]) & ((found[1][:, None] - truth[1]).abs() <= SCORE)
    same &= iou(found[0], truth[0]) >= IOU
    if len(found) > 3 and len(truth) > 3:
        same &= (found[3][:, None] - truth[3]).abs().flatten(2).mean(-1) <= SCORE
    count = min(int(same.any(axis).sum()) for axis in (0, 1))
    distances = (found[0][:, None] - truth[0]).abs().amax(-1)
    # Of several that could be the same, the nearest.
    nearest = distances.where(same, torch.inf).amin(1)
    return nearest[nearest.isfinite()].amax().item() if count else 0.0, count, max(same.shape)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union (N, M) of boxes (N, 4) and (M, 4)."""
    low = torch.maximum(first[:, None, :2], second[:, :2])
    high = torch.minimum(first[:, None, 2:], second[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1] - shared).clamp(min=1e-9)
