import socket

import pytest


@pytest.fixture
def port() -> str:
    """A port that nothing listens on, for the rendezvous of a distributed run."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])
