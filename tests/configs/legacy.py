"""Checkpoints as mmcv 1.7 wrote them, the models that `tools/test.py` builds from them, and mmcv 1.7's image steps."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.runner import TestLoop
from torch import Tensor
from torch.nn import functional as F

from mmengine_overlock import run
from overlock.models.names import to_published
from tests.configs.testing import CONFIGS
from tests.testing import DATA, published_weights

PHOTOGRAPHS = Path(os.environ.get('OVERLOCK_DATA', 'not set'))


def backbone_weights(kind: str, arch: str) -> dict[str, Tensor]:
    """Return the published backbone of kind 'det' or 'seg' below `backbone.`, float32."""
    shapes = json.loads(gzip.decompress((DATA / 'state_dicts.json.gz').read_bytes()))[kind][arch]
    return {f'backbone.{name}': _narrow(value) for name, value in published_weights(shapes).items()}


def head_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return weights of heads by their old names and shapes; matrices are drawn like 1x1 convolutions."""
    drawn = {name: (*shape, 1, 1) if len(shape) == 2 else shape for name, shape in shapes.items()}
    return {name: _narrow(value).reshape(shapes[name]) for name, value in published_weights(drawn).items()}


def _narrow(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def save(path: Path, weights: dict[str, Tensor], **meta) -> Path:
    """Write a file like mmcv's runner: data about the run, the weights, and the state of AdamW."""
    meta = dict(
        meta,
        mmcv_version='1.7.1',
        time='Mon Dec  2 10:00:00 2024',
        seed=0,
        exp_name='overlock.py',
        env_info='sys.platform: linux\nPyTorch: 1.11.0',
        config="model = dict(type='MaskRCNN')\n",
        hook_msgs=dict(best_score=np.float64(0.5), best_ckpt='best.pth', last_ckpt='latest.pth'),
    )
    value = next(iter(weights.values()))
    state = dict(step=87960, exp_avg=torch.zeros_like(value), exp_avg_sq=torch.zeros_like(value))
    group = dict(lr=2e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, initial_lr=2e-4, params=[0])
    torch.save(dict(meta=meta, state_dict=weights, optimizer=dict(state={0: state}, param_groups=[group])), path)
    return path


def load(name: str, checkpoint: Path, data_root: Path, work_dir: Path, scale: tuple[int, int]) -> TestLoop:
    """Run `tools/test.py` up to the first image; return its loop, with the images and the runner with the model."""
    options = {
        'test_dataloader.num_workers': 0,
        'test_dataloader.persistent_workers': False,
        'test_dataloader.dataset.pipeline.1.scale': scale,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TestLoop, 'run', lambda loop: loop)
        return run.test(
            CONFIGS / f'{name}.py', str(checkpoint), data_root=data_root, work_dir=work_dir, cfg_options=options
        )


def assert_holds(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Check that a model has exactly the tensors of an old state dict."""
    torch.testing.assert_close(to_published(model.state_dict(), 'backbone.'), weights, rtol=0, atol=0)


def evaluate(name: str, checkpoint: Path, data_root: Path, folder: Path, scale: tuple[int, int]) -> str:
    """Run `tools/test.py` on two images; return what it prints."""
    command = [
        sys.executable,
        CONFIGS.parent / 'tools/test.py',
        CONFIGS / f'{name}.py',
        checkpoint,
        '--verbose',
        '--data-root',
        data_root,
        '--cfg-options',
        f'test_dataloader.dataset.pipeline.1.scale=({scale[0]},{scale[1]})',
        'test_dataloader.dataset.indices=2',
        'test_dataloader.num_workers=0',
        'test_dataloader.persistent_workers=False',
    ]
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rescaled(image: np.ndarray, scale: tuple[int, int]) -> np.ndarray:
    """Apply `Resize(keep_ratio=True)`: the largest size within the two bounds of the sides, rounded half up."""
    height, width = image.shape[:2]
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return cv2.resize(image, (int(width * factor + 0.5), int(height * factor + 0.5)), interpolation=cv2.INTER_LINEAR)


def normalized(image: np.ndarray) -> Tensor:
    """Apply `Normalize(to_rgb=True)` and `ImageToTensor` to a BGR image (H, W, 3), uint8; return (1, 3, H, W)."""
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    values = ((image[..., ::-1] - mean) * (1 / std)).astype(np.float32)
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def conv(weights: dict[str, Tensor], name: str, x: Tensor, padding: int = 0) -> Tensor:
    """Apply a convolution by the name of its module."""
    return F.conv2d(x, weights[f'{name}.weight'], weights.get(f'{name}.bias'), padding=padding)
