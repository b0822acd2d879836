"""Checkpoints of small networks, and images of several kinds."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmengine_overlock.predict import build_model
from tests.mmengine_overlock.export.conftest import small  # noqa: F401
from tests.mmengine_overlock.test_deploy import CLASSES, CONFIGS
from tests.testing import randomise


@pytest.fixture(scope='session')
def checkpoints(tmp_path_factory):
    """Checkpoints of a small detector and segmenter, as mmengine's runner writes them, beside their configurations."""
    folder = tmp_path_factory.mktemp('checkpoints')
    found = {}
    for name, text in CONFIGS.items():
        (folder / f'{name}.py').write_text(text)
        cfg = Config.fromfile(folder / f'{name}.py')
        torch.manual_seed(0)
        model = build_model(cfg)
        randomise(model.backbone)
        classes = CLASSES['classes'] if name == 'segmenter' else tuple(f'class {i}' for i in range(80))
        meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=classes))
        found[name] = folder / f'{name}.pth'
        torch.save(dict(state_dict=model.state_dict(), meta=meta), found[name])
    return found


def blots(height, width, seed=0):
    """Pixels (H, W, 3) of a smooth image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def images(tmp_path):
    """Two images, one of them with another name than ASCII has, and a broken one."""
    folder = tmp_path / 'images'
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(pixels).save(folder / 'a.png')
    Image.fromarray(pixels[::-1]).save(folder / 'überholt 木.jpg')
    (folder / 'broken.jpg').write_bytes(b'no image')
    return folder
