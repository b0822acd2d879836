"""Waiting of OpenMP's threads."""

import os

import pytest

from overlock.utils.threads import wait_briefly


@pytest.mark.parametrize(
    ('given', 'expected'),
    [({}, '30000'), ({'GOMP_SPINCOUNT': '7'}, '7'), ({'OMP_WAIT_POLICY': 'ACTIVE'}, None)],
    ids=['default', 'count', 'policy'],
)
def test_the_environment_of_the_user_wins(given, expected, monkeypatch):
    for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'):
        # Set first, so that it is brought back to what it was.
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    wait_briefly()
    assert os.environ.get('GOMP_SPINCOUNT') == expected
