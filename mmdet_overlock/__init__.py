"""OverLoCK in MMDetection: importing this registers the backbone `OverLoCK` in `mmdet.registry.MODELS`."""

from mmdet_overlock.backbone import OverLoCK

__all__ = ['OverLoCK']
