"""Shared by the tests of ImageNet training: a small image folder, and a recipe that learns nothing in seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from demo.classifier import draw
from imagenet_overlock import Recipe
from tests.imagenet_overlock import tiny

TRAIN, VALIDATE = (tiny.ROOT / 'tools' / f'imagenet_{name}.py' for name in ('train', 'validate'))


@pytest.fixture(scope='session')
def drawn(tmp_path_factory) -> Path:
    """Ten classes of two training images and one validation image."""
    return draw(tmp_path_factory.mktemp('drawn') / 'data', train=2, val=1, size=40)


@pytest.fixture
def recipe():
    """Make a recipe of the tiny model at 32 pixels, with all that is random on."""
    defaults = dict(
        model='overlock_tiny',
        drop_path=0.1,
        img_size=32,
        batch_size=10,
        workers=0,
        epochs=3,
        cooldown_epochs=0,
        warmup_epochs=1,
        lr=1e-3,
        amp=False,
        model_ema_decay=0.9,
    )
    return lambda **settings: Recipe(**{**defaults, **settings})


@pytest.fixture
def run_tool():
    """Run a tool by a command with the tiny model registered; several processes are started by torchrun."""

    def run(tool: Path, *args, processes: int = 1) -> subprocess.CompletedProcess:
        several = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
        command = [sys.executable, *(several if processes > 1 else []), tiny.__file__, str(tool), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    return run
