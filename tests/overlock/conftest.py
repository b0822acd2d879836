"""Published shapes and golden values."""

import numpy as np
import pytest

from tests.testing import DATA, published_shapes

GOLDEN = ('golden.npz', 'golden_more.npz')


@pytest.fixture(scope='session')
def shapes() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Published shapes: kind ('cls', 'cls_reparam', 'det', 'seg'), variant, name."""
    return published_shapes()


@pytest.fixture(scope='session')
def golden() -> dict[str, np.ndarray]:
    """What the published network gives on `published_weights`, in float64."""
    values: dict[str, np.ndarray] = {}
    for name in GOLDEN:
        with np.load(DATA / name) as file:
            values |= file
    return values
