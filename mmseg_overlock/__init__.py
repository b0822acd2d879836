"""OverLoCK in MMSegmentation: importing this registers the backbone `OverLoCK` in `mmseg.registry.MODELS`."""

from mmengine_overlock.versions import require

require('mmseg_overlock', mmengine=('0.10', '1.0'), mmcv=('2.0', '3.0'), mmseg=('1.0', '2.0'))

from mmseg_overlock.backbone import OverLoCK  # noqa: E402

__all__ = ['OverLoCK']
