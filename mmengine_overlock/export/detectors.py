"""mmdet's detectors as modules from an image to boxes, in steps that a graph can hold for every size and batch.

mmdet selects by masks, image by image, so that shapes depend on values. Here selections have fixed lengths, and what is
left out has the score -1. The heads, coders and anchors are mmdet's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from mmengine_overlock.export.modules import pad

# The score of what is left out: below every sigmoid and softmax.
NONE = -1.0


class Detector(nn.Module):
    """A detector; see `TwoStage` and `OneStage`.

    Args:
        model: mmdet's detector, in evaluation.
        divisor: Sides are padded to multiples of this, and boxes clipped to those before.
    """

    model: Any  # nn.Module does not tell the types of its children

    def __init__(self, model: BaseModel, divisor: int) -> None:
        super().__init__()
        self.model, self.divisor = model, divisor

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Detect objects in a normalized image (B, 3, H, W).

        Returns:
            boxes (B, N, 4), x1, y1, x2, y2 in pixels; scores (B, N), sorted, -1 where there are fewer than N objects;
            labels (B, N), int64, from 0; with a mask head masks (B, N, M, M), each the probabilities inside its box.
        """
        height, width = image.shape[2:]
        limits = torch.stack([torch.scalar_tensor(side, dtype=image.dtype) for side in (width, height)]).repeat(2)
        feats = self.model.backbone(pad(image, self.divisor))
        return self.detect(self.model.neck(feats) if self.model.with_neck else feats, limits)

    def detect(self, feats: Sequence[Tensor], limits: Tensor) -> tuple[Tensor, ...]:
        """Detect objects in the maps of the neck, in an image whose width, height, width, height are `limits`."""
        raise NotImplementedError


class OneStage(Detector):
    """RetinaNet, and what is built like it: anchors, a sigmoid for each class, and one suppression at the end."""

    def detect(self, feats: Sequence[Tensor], limits: Tensor) -> tuple[Tensor, ...]:
        """Detect objects; see `Detector.forward`."""
        head = self.model.bbox_head
        boxes, scores, labels = _anchor_boxes(head, feats, limits)
        return _select(boxes, _suppress(boxes, scores, labels, head.test_cfg), head.test_cfg.max_per_img, labels)


class TwoStage(Detector):
    """Mask R-CNN, Cascade Mask R-CNN, and the same without masks."""

    def detect(self, feats: Sequence[Tensor], limits: Tensor) -> tuple[Tensor, ...]:
        """Detect objects; see `Detector.forward`."""
        rpn, roi = self.model.rpn_head, self.model.roi_head
        boxes, scores, levels = _anchor_boxes(rpn, feats, limits, by_level=True)
        scores = _suppress(boxes, scores, levels, rpn.test_cfg)
        proposals, objectness, _ = _select(boxes, scores, rpn.test_cfg.max_per_img, levels)
        boxes, scores = self._classify(feats, proposals, limits)
        num_classes = scores.shape[2]
        # A class of a proposal is one candidate; a proposal that is none has none.
        scores = scores.where((objectness > NONE).unsqueeze(2), NONE).flatten(1)
        labels = torch.arange(scores.shape[1], device=scores.device).remainder(num_classes).expand_as(scores)
        cfg = roi.test_cfg
        boxes, scores, labels = _select(boxes, _suppress(boxes, scores, labels, cfg), cfg.max_per_img, labels)
        if not roi.with_mask:
            return boxes, scores, labels
        return boxes, scores, labels, self._masks(feats, boxes, labels)

    def _classify(self, feats: Sequence[Tensor], proposals: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Return a box for each class of each proposal (B, N classes, 4), and the scores (B, N, classes)."""
        roi = self.model.roi_head
        cascade = isinstance(roi.bbox_head, nn.ModuleList)
        heads = roi.bbox_head if cascade else [roi.bbox_head]
        extractors = roi.bbox_roi_extractor if cascade else [roi.bbox_roi_extractor]
        logits = []
        for stage, (head, extractor) in enumerate(zip(heads, extractors, strict=True)):
            batch, count = proposals.shape[:2]
            classes, deltas = head(_pool(extractor, feats, proposals))
            logits.append(classes)
            deltas = deltas.view(batch * count, -1, 4)
            if stage + 1 < len(heads) and not head.reg_class_agnostic:
                best = classes[:, :-1].argmax(1)
                deltas = deltas.gather(1, best.view(-1, 1, 1).expand(-1, 1, 4))
            boxes = proposals.reshape(batch * count, 1, 4).expand_as(deltas)
            boxes = _decode(head.bbox_coder, boxes.reshape(-1, 4), deltas.reshape(-1, 4), limits)
            proposals = boxes.view(batch, -1, 4)
        scores = (sum(logits) / len(logits)).softmax(-1)[:, :-1]
        scores = scores.view(batch, count, -1)
        if heads[-1].reg_class_agnostic:
            proposals = proposals.repeat_interleave(scores.shape[2], dim=1)
        return proposals, scores

    def _masks(self, feats: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return the probabilities (B, N, M, M) of the masks of the given classes inside the boxes."""
        roi = self.model.roi_head
        cascade = isinstance(roi.mask_head, nn.ModuleList)
        heads = roi.mask_head if cascade else [roi.mask_head]
        extractors = roi.mask_roi_extractor if cascade else [roi.mask_roi_extractor]
        masks = []
        for head, extractor in zip(heads, extractors, strict=True):
            logits = head(_pool(extractor, feats, boxes))
            label = labels.reshape(-1, 1, 1, 1) * (not head.class_agnostic)
            masks.append(logits.gather(1, label.expand(-1, 1, *logits.shape[2:])).sigmoid())
        return (sum(masks) / len(masks)).view(*boxes.shape[:2], *masks[0].shape[2:])


def _anchor_boxes(
    head: Any, feats: Sequence[Tensor], limits: Tensor, by_level: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best boxes of each level of a head with anchors.

    Returns:
        boxes (B, N, 4), their scores (B, N), and their classes (B, N), or with `by_level` their levels.
    """
    cfg, parts = head.test_cfg, []
    outs: Sequence[Sequence[Tensor]] = head(feats)
    for level, (classes, deltas) in enumerate(zip(*outs, strict=True)):
        batch, _, *size = classes.shape
        anchors = head.prior_generator.single_level_grid_priors(
            tuple(size), level, dtype=classes.dtype, device=classes.device
        )
        classes = classes.permute(0, 2, 3, 1).reshape(batch, -1, head.cls_out_channels)
        deltas = deltas.permute(0, 2, 3, 1).reshape(batch, -1, 4)
        scores = classes.sigmoid() if head.use_sigmoid_cls else classes.softmax(-1)[..., :-1]
        num_classes = scores.shape[2]
        scores, index = _top(scores.flatten(1), cfg.nms_pre)
        anchor, label = index // num_classes, index % num_classes
        # What fills up a level with fewer candidates points behind them.
        anchor = anchor.clamp(max=anchors.shape[0] - 1)
        boxes = _decode(
            head.bbox_coder,
            anchors.index_select(0, anchor.flatten()),
            deltas.gather(1, anchor.unsqueeze(2).expand(-1, -1, 4)).reshape(-1, 4),
            limits,
        )
        parts.append((boxes.view(batch, -1, 4), scores, torch.full_like(label, level) if by_level else label))
    boxes, scores, labels = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return boxes, scores, labels


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` highest of each row of (B, N) and their indices; where N is less, -1 and indices from N on."""
    values, index = F.pad(scores, (0, count), value=NONE).topk(count)
    return values, index


def _decode(coder: Any, boxes: Tensor, deltas: Tensor, limits: Tensor) -> Tensor:
    """Move boxes (N, 4) by deltas (N, 4), and clip them to the image."""
    # Clipped here: the coder's way writes into slices.
    return torch.minimum(coder.decode(boxes, deltas).clamp(min=0), limits)


def _suppress(boxes: Tensor, scores: Tensor, kinds: Tensor, cfg: Any) -> Tensor:
    """Return the scores (B, N) of boxes (B, N, 4), -1 for those with a better one of the same kind and image on them.

    So are those of too low a score and too small a size, as in mmdet.
    """
    batch = torch.arange(boxes.shape[0], device=boxes.device).unsqueeze(1)
    sides = boxes[..., 2:] - boxes[..., :2]
    valid = (scores > cfg.get('score_thr', NONE)) & (sides > cfg.get('min_bbox_size', NONE)).all(-1)
    # As in mmcv, offsets keep boxes of several kinds apart.
    kinds = batch * (kinds.max() + 1) + kinds
    offsets = kinds.to(boxes.dtype) * (boxes.max() + 1)
    # Two boxes without a size are always kept: torchvision promises torch.export as many.
    placed = F.pad((boxes + offsets.unsqueeze(2)).view(-1, 4), (0, 0, 0, 2))
    flat = F.pad(scores.flatten(), (0, 2), value=NONE)
    index = torch.cat([valid.flatten(), valid.new_ones(2)]).nonzero().squeeze(1)
    kept = nms(placed.index_select(0, index), flat.index_select(0, index), cfg.nms.iou_threshold)
    kept = index.index_select(0, kept)
    return torch.full_like(flat, NONE).index_put((kept,), flat.index_select(0, kept))[:-2].view_as(scores)


def _select(boxes: Tensor, scores: Tensor, count: int, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `count` best boxes (B, count, 4), their scores and labels; zeros and -1 where there are fewer."""
    scores, index = _top(scores, count)
    index = index.clamp(max=labels.shape[1] - 1)
    found = scores > NONE
    boxes = boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4)) * found.unsqueeze(2)
    return boxes, scores, labels.gather(1, index) * found


def _pool(extractor: Any, feats: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Return the features (B N, C, S, S) of boxes (B, N, 4), each from the level for its size."""
    batch = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype).view(-1, 1, 1)
    rois = torch.cat([batch.expand(-1, boxes.shape[1], 1), boxes], 2).view(-1, 5)
    levels = extractor.map_roi_levels(rois, extractor.num_inputs).unsqueeze(1)
    pooled: Tensor | None = None
    for level, (feat, layer) in enumerate(zip(feats, extractor.roi_layers, strict=False)):
        # A box of another level costs nothing here: it has no pixels.
        own = torch.cat([rois[:, :1], rois[:, 1:] * (levels == level)], 1)
        found = roi_align(feat, own, layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned)
        pooled = found if pooled is None else found.where((levels == level)[..., None, None], pooled)
    assert pooled is not None
    return pooled
