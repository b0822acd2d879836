"""OverLoCK in MMSegmentation: importing this registers the backbone `OverLoCK` in `mmseg.registry.MODELS`."""

from mmseg_overlock.backbone import OverLoCK

__all__ = ['OverLoCK']
