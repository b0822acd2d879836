"""OverLoCK and MogaNet in MMSegmentation: importing this registers both backbones in `mmseg.registry.MODELS`."""

from mmseg_overlock.backbone import MogaNet, OverLoCK

__all__ = ['MogaNet', 'OverLoCK']
