"""Settings and fixtures of all tests."""

import logging
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.disk import Disk

TOOLS = Path(__file__).resolve().parents[1] / 'tools'

# Without a GPU Triton's interpreter runs our kernels; it has to be asked for before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

# pytest keeps whatever is logged, and torch.compile logs each step of its tracing where it sees that somebody does: it
# then takes several times as long.
logging.getLogger('torch.__trace').propagate = False


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Run a script of tools/ in this process, on the CPU, in the current folder: its exit code, output and errors."""
    from mmengine.device import utils
    from mmengine.utils import ManagerMixin

    monkeypatch.setattr(utils, 'DEVICE', 'cpu')
    monkeypatch.setattr(sys, 'path', [*sys.path])

    def forget(kind=ManagerMixin):
        """Forget loggers, message hubs, visualizers and scopes, which mmengine keeps by name for the whole process."""
        kind._instance_dict.clear()
        for inner in kind.__subclasses__():
            forget(inner)

    def run(name, *arguments):
        forget()
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, arguments)])
        capsys.readouterr()
        try:
            runpy.run_path(str(TOOLS / f'{name}.py'), run_name='__main__')
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return (code, *capsys.readouterr())

    yield run
    forget()


@pytest.fixture
def disk(tmp_path):
    """A small file system, which can be full or read-only."""
    disk = Disk(tmp_path / 'disk')
    yield disk
    disk.leave()
