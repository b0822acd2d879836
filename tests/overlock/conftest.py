"""Published shapes and golden values."""

import gzip
import json

import numpy as np
import pytest

from tests.testing import DATA


@pytest.fixture(scope='session')
def shapes() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Published shapes: kind ('cls', 'cls_reparam', 'det', 'seg'), variant, name."""
    return json.loads(gzip.decompress((DATA / 'state_dicts.json.gz').read_bytes()))


@pytest.fixture(scope='session')
def golden() -> dict[str, np.ndarray]:
    """What the published network gives on `published_weights`, in float64."""
    with np.load(DATA / 'golden.npz') as file:
        return dict(file)
