"""Published shapes and golden values."""

import numpy as np
import pytest

from tests.testing import DATA, published_shapes


@pytest.fixture(scope='session')
def shapes() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Published shapes: kind ('cls', 'cls_reparam', 'det', 'seg'), variant, name."""
    return published_shapes()


@pytest.fixture(scope='session')
def golden() -> dict[str, np.ndarray]:
    """What the published network gives on `published_weights`, in float64."""
    with np.load(DATA / 'golden.npz') as file:
        return dict(file)
