"""The segmentation form of the backbone."""

from typing import Any

from mmseg.registry import MODELS

from mmengine_overlock.backbone import MogaNet, OverLoCKModule

MODELS.register_module(module=MogaNet)


@MODELS.register_module()
class OverLoCK(OverLoCKModule):
    """The OverLoCK backbone, by default without the overview in its last output, as in published segmenters.

    Args:
        arch: 'xt', 't', 's', 'b', or a dict of the fields of `overlock.Arch`.
        overview_residual: Whether the overview is added to the last output.
        **kwargs: Those of `overlock.OverLoCKBackbone`, and `init_cfg`.
    """

    def __init__(self, arch: str | dict = 'xt', overview_residual: bool = False, **kwargs: Any) -> None:
        super().__init__(arch, overview_residual=overview_residual, **kwargs)
