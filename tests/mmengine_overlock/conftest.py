import functools
import os

import pytest
from mmengine.config import Config

from tests.toy import write_config


@pytest.fixture
def write_toy(tmp_path, monkeypatch):
    """Write a configuration of the toy model into the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(write_config, tmp_path)


@pytest.fixture
def quick_saves(monkeypatch):
    """Formatting the configuration is nearly all the time that a small checkpoint takes, and disks are slow."""
    monkeypatch.setattr(Config, 'pretty_text', '')
    monkeypatch.setattr(os, 'fsync', lambda file: None)
