"""Export networks to formats that run without this project, and check each file before it takes its name.

A file has one input, `image` (B, 3, H, W), RGB: float32, normalized, or with `preprocessing` uint8 pixels. Its outputs:

- classifiers: `logits` (B, classes)
- backbones: `stride4`, `stride8`, `stride16`, `stride32`
- segmenters: `logits` (B, classes, H, W), float32, or `labels` (B, H, W), int64
- detectors: `boxes` (B, N, 4), float32, x1, y1, x2, y2 in pixels of the input; `scores` (B, N), sorted, -1 where there
  are fewer than N objects; `labels` (B, N), int64, from 0; with a mask head `masks` (B, N, M, M), probabilities inside
  each box

Its metadata, strings or JSON: `task` ('classifier', 'backbone', 'segmenter', 'detector'), `outputs`, `input` (what it
takes, in words), `mean` and `std` of R, G, B, `pad_size_divisor` (sides have to be multiples of it, padded at the right
and the bottom; 1 for detectors, which pad inside); of a model with a configuration also `pipeline` (the transforms
between reading and packing an image), `smallest_side` (in pixels), `classes`, `palette`; of a detector with masks
`mask_threshold`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from mmengine_overlock.export.checks import Limits, Run, compare, open_onnx, open_openvino, open_program, require
from mmengine_overlock.export.graph import metadata, to_openvino, trace, write_onnx
from mmengine_overlock.export.modules import in_half
from mmengine_overlock.export.scores import score, test_config
from mmengine_overlock.export.subjects import Subject, make_subject
from mmengine_overlock.predict.exported import fit_inside, pad_to
from mmengine_overlock.quiet import quiet
from overlock.utils.errors import UserError
from overlock.utils.files import IMAGE_SUFFIXES, check_writable, drafted

# The suffix of each format, and the packages that it needs beside torch.
FORMATS = {
    'onnx': ('.onnx', ('onnx', 'onnxscript', 'onnxruntime')),
    'exported-program': ('.pt2', ()),
    'openvino': ('.xml', ('onnx', 'onnxscript', 'onnxruntime', 'openvino')),
    'tensorrt': ('.engine', ('tensorrt',)),
}
# Of the images that an int8 file is calibrated on, at most.
_CALIBRATED = 32


def export(
    config: str | Path,
    checkpoint: str | None = None,
    *,
    format: str = 'onnx',
    out: str | Path,
    part: str = 'all',
    size: str = 'dynamic',
    images: str | Path | None = None,
    data_root: str | Path | None = None,
    preprocessing: bool = False,
    label_map: bool = False,
    fp16: bool = False,
    int8: str | Path | None = None,
    cfg_options: dict[str, Any] | None = None,
) -> str:
    """Export a classifier, detector, segmenter or backbone, in its deploy form.

    The file takes its name only after a runtime of the format ran it at other sizes than the traced one, and on images,
    and agreed with PyTorch.

    Args:
        config: The configuration that the model was trained with, or a classifier: `overlock_xt`, `moganet_t`, ...
        checkpoint: Its weights: path, URL or published name; None for random ones.
        format: 'onnx', 'exported-program' (a file of torch.export), 'openvino' or 'tensorrt'.
        out: The file.
        part: 'all' or 'backbone'.
        size: 'dynamic' for every batch, height and width, or 'HxW' for one image of this size.
        images: An image file, or a folder of which the first four are compared; none for random pixels alone.
        data_root: Folder of the configuration's data; the file and PyTorch are scored on its test set.
        preprocessing: Whether the file takes RGB pixels (uint8) and normalizes them.
        label_map: Whether a segmenter gives the label of each pixel instead of logits.
        fp16: Whether backbone, neck and a segmenter's head compute in float16, and all weights are stored in it; for
            ONNX and OpenVINO. Inputs and outputs stay float32.
        int8: A folder of images, of which 32 calibrate; convolutions then compute in int8. For ONNX.
        cfg_options: Settings by dotted name, over those of the configuration.

    Returns:
        What was written, and the comparison.

    Raises:
        UserError, CheckpointError: What the user gave cannot be used; one sentence says why.
        UserError: The exported network gives something else than PyTorch.
    """
    out, fixed = Path(out).expanduser(), _parse_size(size)
    _check(format, out, fp16, int8)
    subject = make_subject(
        config, checkpoint, part=part, preprocessing=preprocessing, label_map=label_map, cfg_options=cfg_options
    )
    if fixed and min(fixed) < subject.least:
        raise UserError(f'--size must be at least {subject.least}x{subject.least} for this model, got {size}')
    test = test_config(subject, data_root, fixed) if data_root else None
    # An int8 file is compared on the images of the folder that come last, beside those that it is calibrated on.
    paths = _image_files(images)[:4] if images else _image_files(int8)[-4:]
    inputs = _inputs(subject, fixed, paths)
    with drafted(*_files(out, format)) as drafts, quiet():
        nodes = _write(subject, format, drafts[0], fixed, fp16, int8)
        runtime, run = _open(format, drafts[0])
        report = compare(run, runtime, subject, inputs)
        if not int8:
            require(report, subject, Limits(5e-2, 0.9) if fp16 else Limits(), out)
        scores = f'\n{score(run, runtime, subject, test, fixed)}' if test else ''
        note = f'{sum(draft.stat().st_size for draft in drafts) / 2**20:.1f} MiB' + f', {nodes} nodes' * bool(nodes)
    weights = checkpoint or 'random weights: no checkpoint was given'
    return f'{subject.kind} of {config}, {weights}\n{report}{scores}\nwrote {out}, {note}'


def _write(
    subject: Subject, format: str, file: Path, fixed: tuple[int, int] | None, fp16: bool, int8: str | Path | None
) -> int:
    """Trace a subject, write it in a format, and return the number of nodes, 0 for one without."""
    program = trace(replace(subject, module=in_half(subject.module)) if fp16 else subject, fixed)
    if format == 'exported-program':
        torch.export.save(program, file, extra_files={'info.json': json.dumps(metadata(subject))})
        return 0
    onnx = file.with_suffix('.onnx')
    nodes = write_onnx(program, subject, onnx)
    if fp16 or int8:
        _narrow(onnx, subject, int8, fixed)
    if format == 'openvino':
        to_openvino(onnx, file)
    return nodes


def _open(format: str, file: Path) -> tuple[str, Run]:
    """Return what runs the files of a format, by name, with a file open in it."""
    runtimes = {'onnx': ('onnxruntime', open_onnx), 'openvino': ('OpenVINO', open_openvino)}
    name, opener = runtimes.get(format, ('torch.export', open_program))
    return name, opener(file)


def _files(out: Path, format: str) -> list[Path]:
    return [out, out.with_suffix('.bin')] if format == 'openvino' else [out]


def _inputs(subject: Subject, fixed: tuple[int, int] | None, paths: Sequence[Path]) -> list[tuple[str, torch.Tensor]]:
    """Return named inputs to compare on: random pixels of two sizes, or of the fixed one, and images."""
    least = subject.least
    # The smallest maps, and a batch of another shape.
    shapes = [(1, *fixed)] if fixed else [(1, least, least + 30), (3, max(224, least), max(320, least))]
    inputs = [('', subject.example(*shape)) for shape in shapes]
    for path in paths:
        inputs.append((path.name, _read(subject, path, fixed)))
    return inputs


def _read(subject: Subject, path: Path, fixed: tuple[int, int] | None) -> torch.Tensor:
    """Read an image; where there is a fixed size, bring it inside, and pad it to that, as predictions do."""
    image = subject.read(path)
    if fixed is None:
        return image
    sides = fit_inside((image.shape[2], image.shape[3]), fixed)
    pixels = image.dtype == torch.uint8
    return pad_to(F.interpolate(image.float(), sides, mode='bilinear'), fixed, subject.info, pixels)


def _narrow(onnx: Path, subject: Subject, int8: str | Path | None, fixed: tuple[int, int] | None) -> None:
    # Needs onnx.
    from mmengine_overlock.export.narrow import to_float16, to_int8

    if int8:
        to_int8(onnx, [_read(subject, path, fixed) for path in _image_files(int8)[:_CALIBRATED]])
    else:
        to_float16(onnx)


def _parse_size(size: str) -> tuple[int, int] | None:
    if size == 'dynamic':
        return None
    height, _, width = size.partition('x')
    if not (height.isdecimal() and width.isdecimal()):
        raise UserError(f"--size takes 'dynamic' or HEIGHTxWIDTH, as 800x1344, got {size}")
    return int(height), int(width)


def _check(format: str, out: Path, fp16: bool, int8: str | Path | None) -> None:
    """Check what does not need the model."""
    if format not in FORMATS:
        raise UserError(f'--format takes {", ".join(FORMATS)}, got {format}')
    suffix, packages = FORMATS[format]
    if out.suffix != suffix or out.is_dir():
        raise UserError(f'--out takes a file name that ends in {suffix} for {format}, got {out}')
    if format == 'tensorrt':
        raise UserError(
            'TensorRT builds its engines on the GPU that they run on; export --format onnx, and there run '
            'trtexec --onnx=FILE.onnx --saveEngine=FILE.engine'
        )
    if (fp16 and format == 'exported-program') or (int8 and format != 'onnx'):
        raise UserError(
            f'--fp16 is for ONNX and OpenVINO and --int8 for ONNX, got --format {format}; leave it out, or export onnx'
        )
    if fp16 and int8:
        raise UserError('--fp16 and --int8 exclude each other; give one of them')
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'--format {format} needs {", ".join(missing)}; install with `pip install {" ".join(missing)}`, or export '
            'with --format exported-program, which needs nothing beside torch'
        )
    check_writable(out)


def _image_files(path: str | Path | None) -> list[Path]:
    if path is None:
        return []
    path = Path(path)
    found = (
        [path] if path.is_file() else sorted(file for file in path.rglob('*') if file.suffix.lower() in IMAGE_SUFFIXES)
    )
    if not found:
        raise UserError(
            f'{path} holds no images ({", ".join(IMAGE_SUFFIXES)}); give an image file, or a folder of some'
        )
    return found
