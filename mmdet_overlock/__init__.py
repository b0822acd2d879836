"""OverLoCK in MMDetection: importing this registers the backbone `OverLoCK` in `mmdet.registry.MODELS`."""

from mmengine_overlock.versions import require

require('mmdet_overlock', mmengine=('0.10', '1.0'), mmcv=('2.0', '3.0'), mmdet=('3.0', '4.0'))

from mmdet_overlock.backbone import OverLoCK  # noqa: E402

__all__ = ['OverLoCK']
