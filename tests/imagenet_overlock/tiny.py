"""Registers a tiny OverLoCK with timm; as a script, runs another script with it: `tiny.py SCRIPT ARGS...`."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from timm.models import build_model_with_cfg, register_model  # noqa: E402

from overlock.timm import TimmMogaNet, TimmOverLoCK  # noqa: E402

ARCH = dict(
    embed_dims=(8, 16, 16, 32), base_depths=(1, 1, 1), overview_depth=1, focus_depths=(2, 1), focus_groups=(2, 4)
)


@register_model
def overlock_tiny(pretrained=False, **kwargs):
    return build_model_with_cfg(TimmOverLoCK, 'overlock_tiny', pretrained, arch=ARCH, **kwargs)


@register_model
def overlock_wide(pretrained=False, **kwargs):
    """Wide enough for bfloat16 on CPUs: oneDNN's depthwise convolutions of few channels take minutes there."""
    arch = {**ARCH, 'embed_dims': (64, 64, 64, 64)}
    return build_model_with_cfg(TimmOverLoCK, 'overlock_wide', pretrained, arch=arch, **kwargs)


@register_model
def moganet_tiny(pretrained=False, **kwargs):
    arch = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 2, 1))
    return build_model_with_cfg(TimmMogaNet, 'moganet_tiny', pretrained, arch=arch, **kwargs)


if __name__ == '__main__':
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name='__main__')
