"""Networks as modules from one image tensor to a tuple of tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F


class Preprocessed(nn.Module):
    """A network that takes RGB pixels, uint8.

    Args:
        network: Takes a normalized image.
        mean, std: Of each channel, in RGB.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, tuple(mean), tuple(std)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Run the network on pixels (B, 3, H, W)."""
        return self.network(normalize(image, self.mean, self.std))


class Outputs(nn.Module):
    """A module whose output is a tuple, of one tensor too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Run the network on an image (B, 3, H, W)."""
        outs = self.network(image)
        return (outs,) if isinstance(outs, Tensor) else tuple(outs)


class Segmenter(nn.Module):
    """mmseg's EncoderDecoder as a module from an image to logits, or to the label of each pixel.

    Args:
        model: The segmenter, in evaluation.
        label_map: Whether to return labels.
    """

    def __init__(self, model: BaseModel, label_map: bool = False) -> None:
        super().__init__()
        self.model, self.label_map = model, label_map
        self.align_corners: bool = model.decode_head.align_corners
        _upsample_by_factor(model)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Segment an image (B, 3, H, W): logits (B, classes, H, W), or labels (B, H, W), int64."""
        logits = self.model.decode_head(self.model.extract_feat(image))
        logits = F.interpolate(logits, image.shape[2:], mode='bilinear', align_corners=self.align_corners)
        return (logits.argmax(1) if self.label_map else logits,)


class Half(nn.Module):
    """A network in float16 between maps in float32.

    Args:
        network: Takes one map or several, and gives one or several.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Run the network."""
        outs = self.network(x.half() if isinstance(x, Tensor) else tuple(part.half() for part in x))
        return outs.float() if isinstance(outs, Tensor) else tuple(out.float() for out in outs)


def in_half(module: nn.Module) -> nn.Module:
    """Copy a module with its backbone, its neck and a segmenter's head in float16.

    Detectors decide on boxes in float32: float16 cannot tell two pixels of a large image apart.
    """
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        names = ('network',) if isinstance(parent, Outputs) else ('backbone', 'neck', 'decode_head')
        if isinstance(parent, (Outputs, BaseModel)):
            for name in names:
                child = getattr(parent, name, None)
                if isinstance(child, nn.Module):
                    setattr(parent, name, Half(child))
    return module


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return `(pixels - mean) / std` of each channel of (B, 3, H, W), float32."""
    x = pixels.float()
    return (x - x.new_tensor(mean).view(-1, 1, 1)) / x.new_tensor(std).view(-1, 1, 1)


def pad(x: Tensor, divisor: int) -> Tensor:
    """Pad (B, C, H, W) with zeros at the right and the bottom, to sides that are multiples of `divisor`."""
    height, width = x.shape[2:]
    return F.pad(x, (0, -width % divisor, 0, -height % divisor))


def _upsample_by_factor(model: nn.Module) -> None:
    """Put torch's upsampling in the place of mmseg's, in place: that computes sizes as numbers of Python."""
    for parent in model.modules():
        child: Any
        for name, child in parent.named_children():
            if type(child).__module__ == 'mmseg.models.utils.wrappers' and not child.size:
                options: Any = dict(mode=child.mode, align_corners=child.align_corners)
                setattr(parent, name, nn.Upsample(scale_factor=child.scale_factor, **options))
