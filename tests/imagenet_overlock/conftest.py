"""What the tests of ImageNet training share: a small image folder, and a recipe that learns nothing in seconds."""

import os
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
    """Makes a recipe of the tiny model at 32 pixels, with all that is random on."""

    def make(**settings) -> Recipe:
        return Recipe(
            **{
                **dict(
                    model='overlock_tiny',
                    drop_path=0.1,
                    img_size=32,
                    batch_size=10,
                    workers=0,
                    epochs=3,
                    warmup_epochs=1,
                    lr=1e-3,
                    model_ema_decay=0.9,
                ),
                **settings,
            }
        )

    return make


@pytest.fixture
def run_tool():
    """Runs a tool with the tiny model registered, in one process or by torchrun in several."""

    def run(tool: Path, *args, processes: int = 1) -> subprocess.CompletedProcess:
        launcher = (
            []
            if processes == 1
            else ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
        )
        command = [sys.executable, *launcher, tiny.__file__, str(tool), *map(str, args)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'},
        )

    return run
