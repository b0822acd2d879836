import functools

import pytest

from tests.toy import write_config


@pytest.fixture
def write_toy(tmp_path, monkeypatch):
    """Write a configuration of the toy model into the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(write_config, tmp_path)
