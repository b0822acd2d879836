import os
import socket
import subprocess
import sys

import pytest

from tests.testing import ROOT


@pytest.fixture
def start_tool(tmp_path):
    """Run a script of tools/ in a process of its own, on the CPU, with one thread, in a folder of its own."""

    def start(name: str, *arguments, run=subprocess.run, **environment: str):
        given = {name: value for name, value in os.environ.items() if name not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
        settings = {'PYTHON': sys.executable, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
        command = ['bash' if name.endswith('.sh') else sys.executable, ROOT / 'tools' / name, *arguments]
        how = dict(cwd=tmp_path, env={**given, **settings, **environment}, text=True)
        if run is subprocess.run:
            how.update(capture_output=True, timeout=600)
        return run([*map(str, command)], **how)

    return start


@pytest.fixture
def port() -> str:
    """A port that nothing listens on, for the rendezvous of a distributed run."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])
