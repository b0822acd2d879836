"""Libraries are kept quiet for a while, and no longer."""

import logging
import threading
import warnings

from mmengine_overlock.quiet import quiet


def test_threads_that_keep_quiet_at_once_end_it(monkeypatch):
    monkeypatch.setattr(logging.root.manager, 'disable', 0)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with quiet():
            entered.set()
            leave.wait(10)

    with warnings.catch_warnings():
        before = [*warnings.filters]
        thread = threading.Thread(target=hold)
        with quiet():
            thread.start()
            entered.wait(0.2)
        leave.set()
        thread.join()
        assert logging.root.manager.disable == 0 and warnings.filters == before
