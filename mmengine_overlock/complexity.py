"""Count the parameters and multiply-adds of a network, or of a whole detector or segmenter.

mmengine's counter traces one run: it knows convolutions, matrix products, norms, and interpolation, and is told here of
ContMix. As in the papers of the field, a multiply-add counts once; activations, sums of maps, softmax, RoIAlign, and
NMS count nothing.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.analysis.jit_handles import get_shape
from mmengine.config import Config
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmengine_overlock.config import load_config, nodes
from mmengine_overlock.predict import build_model
from overlock.models.mixing import MixingBlock
from overlock.ops.contmix.complexity import OPERATORS, multiply_adds
from overlock.ops.tracing import keep_operators
from overlock.utils.errors import UserError

# Height and width that papers count at.
SIZES = {'mmdet': (800, 1280), 'mmseg': (512, 2048)}


@dataclass(frozen=True)
class Complexity:
    """What a network costs.

    Attributes:
        parameters: Their number, by part of the network; '' is the whole.
        multiply_adds: Those of one image, by part.
        operators: Those of the whole, by operator.
        size: Height and width of the image.
    """

    parameters: dict[str, int]
    multiply_adds: dict[str, int]
    operators: dict[str, int]
    size: tuple[int, int]

    def __str__(self) -> str:
        rows = [('part', 'parameters', 'multiply-adds')]
        rows += [
            (name or 'whole', f'{self.parameters[name] / 1e6:.2f} M', f'{self.multiply_adds[name] / 1e9:.2f} G')
            for name in (*filter(None, self.parameters), '')
            if self.parameters[name] or self.multiply_adds[name]
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        title = f'image of {self.size[0]}x{self.size[1]}'
        return '\n'.join([title, *(f'{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}' for a, b, c in rows)])


def count(model: nn.Module, image: Tensor, **arguments: Any) -> Complexity:
    """Count one run of a network in evaluation.

    Args:
        model: The network. Its ContMix is counted as the fused operator, whatever backend it is set to.
        image: (1, C, H, W).
        **arguments: What else its `forward` takes.
    """
    layers = [module for module in model.eval().modules() if not any(True for _ in module.children())]
    kept: list[Tensor] = []
    forward = model.forward

    def keep(layer: nn.Module, args: Any, out: Any) -> None:
        # A trace drops the steps that no result depends on: an element of each layer's output is a result.
        if isinstance(out, Tensor) and out.numel():
            kept.append(out[(0,) * out.ndim].clone())

    def traced(image: Tensor) -> list[Tensor]:
        kept.clear()
        forward(image, **arguments)
        return kept

    analyzer = FlopAnalyzer(model, (image,))
    analyzer.set_op_handle(**{f'overlock::{name}': _contmix for name in OPERATORS})
    # Masks are pasted into the image by interpolation, which is no part of the network.
    analyzer.set_op_handle('aten::grid_sampler', None)
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings('none')
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    backends = {block: block.contmix_backend for block in model.modules() if isinstance(block, MixingBlock)}
    for block in backends:
        block.contmix_backend = 'auto'  # a fused one, or `eager`
    model.forward = traced
    try:
        with torch.no_grad(), keep_operators():
            by_part, by_operator = analyzer.by_module(), analyzer.by_operator()
    finally:
        model.forward = forward
        for hook in hooks:
            hook.remove()
        for block, backend in backends.items():
            block.contmix_backend = backend
    parts: dict[str, nn.Module] = {'': model, **dict(model.named_children())}
    return Complexity(
        {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()},
        {name: int(by_part[name]) for name in parts},
        {name: int(value) for name, value in by_operator.items()},
        (image.shape[2], image.shape[3]),
    )


def _contmix(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter(contmix=multiply_adds(get_shape(inputs[0]), get_shape(inputs[1])))


def count_config(
    config: str | Path,
    size: tuple[int, int] | None = None,
    deploy: bool = True,
    cfg_options: dict[str, Any] | None = None,
) -> Complexity:
    """Count a detector or segmenter in one prediction, with random weights, on the CPU.

    A detector keeps as many boxes as its configuration allows: 1000 proposals and 100 detections with those here. Heads
    that only training needs are left out.

    Args:
        config: File of the configuration.
        size: Height and width of the image; by default those of `SIZES` for the configuration's toolbox.
        deploy: Whether the backbone is folded for inference.
        cfg_options: Settings by dotted name, over those of the configuration.

    Raises:
        UserError: The configuration cannot be used; one sentence says why.
    """
    cfg = load_config(config, cfg_options)
    scope = cfg.get('default_scope')
    if 'backbone' not in cfg.get('model', {}) or scope not in SIZES:
        raise UserError(
            f'{config} must be the configuration of a detector or segmenter: expected `model.backbone`, and '
            f'`default_scope` to be one of {", ".join(SIZES)}, got {scope!r}.'
        )
    height, width = size or SIZES[scope]
    model: Any = _build(cfg)
    if deploy:
        model.backbone.switch_to_deploy()
    shapes = {name: (height, width) for name in ('ori_shape', 'img_shape', 'pad_shape')}
    sample = BaseDataElement(metainfo=dict(shapes, scale_factor=(1.0, 1.0)))
    data = model.data_preprocessor(dict(inputs=[torch.zeros(3, height, width)], data_samples=[sample]))
    return count(model, data['inputs'], data_samples=data['data_samples'], mode='predict')


def _build(cfg: Config) -> nn.Module:
    cfg = deepcopy(cfg)
    cfg.model.pop('auxiliary_head', None)
    for node in nodes(cfg.model.get('test_cfg')):
        # No box is dropped for its score or its overlap: what random weights find does not matter.
        node.update({name: value for name, value in (('score_thr', 0.0), ('iou_threshold', 1.0)) if name in node})
    return build_model(cfg)
