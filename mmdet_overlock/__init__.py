"""OverLoCK and MogaNet in MMDetection: importing this registers both backbones in `mmdet.registry.MODELS`."""

from mmdet_overlock.backbone import MogaNet, OverLoCK

__all__ = ['MogaNet', 'OverLoCK']
