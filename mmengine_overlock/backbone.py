"""Backbones as modules of mmengine."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit, update_init_info

from mmengine_overlock.terminal import tell
from overlock import MogaNetBackbone, OverLoCKBackbone
from overlock.checkpoint import load_pretrained
from overlock.models.network import Network
from overlock.utils.errors import UserError


class WithInitCfg(Network, BaseModule):
    """mmengine's `init_cfg` for a backbone; it stands before the backbone in a class's bases.

    `init_cfg=dict(type='Pretrained', checkpoint=...)` takes a name in `overlock.checkpoint.WEIGHTS`, a path or a URL.
    It loads ImageNet weights, or those of the backbone in a detector's or segmenter's file, logs what was loaded
    and what was not, and refuses a file of another variant. `prefix` says where else in the file they are.

    Args:
        *args: Those of the backbone.
        init_cfg: Initialization, in mmengine's form.
        **kwargs: Those of the backbone.
    """

    def __init__(self, *args: Any, init_cfg: dict | list[dict] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_cfg = copy.deepcopy(init_cfg)

    def init_weights(self) -> None:
        """Initialize by `init_cfg`, pretrained weights last.

        Raises:
            UserError: If `init_cfg` is not in mmengine's form.
            overlock.checkpoint.CheckpointError: If pretrained weights cannot be found, read or used.
        """
        given = self.init_cfg
        init_cfgs = [given] if given and isinstance(given, dict) else list(given or [])
        typed = all(isinstance(cfg, dict) and 'type' in cfg for cfg in init_cfgs)
        pretrained = [cfg for cfg in init_cfgs if cfg['type'] in ('Pretrained', PretrainedInit)] if typed else []
        if not typed or not all(cfg.get('checkpoint') for cfg in pretrained):
            raise UserError(
                "init_cfg is a dict with a type, or a list of them, and 'Pretrained' has a checkpoint (a name, path or "
                f'URL); got {given}'
            )
        self.init_cfg = [cfg for cfg in init_cfgs if cfg not in pretrained] or None
        first_call = not self.is_init
        try:
            super().init_weights()
        finally:
            self.init_cfg = given
        for cfg in pretrained if first_call else ():
            report = load_pretrained(self, cfg['checkpoint'], cfg.get('prefix'))
            tell(str(report))
            if hasattr(self, '_params_init_info'):
                update_init_info(self, init_info=f'Pretrained: {report.source}')


class OverLoCKModule(WithInitCfg, OverLoCKBackbone):
    """`overlock.OverLoCKBackbone` with mmengine's `init_cfg`."""


class MogaNet(WithInitCfg, MogaNetBackbone):
    """`overlock.MogaNetBackbone` with mmengine's `init_cfg`, for the registries of both toolboxes."""
