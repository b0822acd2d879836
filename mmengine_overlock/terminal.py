"""Speak calmly on the terminal: a few lines, a progress bar, results; the log file in the work folder holds the rest.

A `Terminal` takes the place of the console handlers of mmengine's loggers while a run lasts. It shows warnings and the
records marked `terminal`, as `tell` makes them.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from math import inf
from typing import Any, TextIO

from mmengine.logging import MMLogger
from mmengine.logging.logger import FilterDuplicateWarning
from mmengine.runner import Runner
from tqdm import tqdm

from mmengine_overlock.launch import is_first

# Where there is no terminal to rewrite a bar on.
_LINE = '{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]'
_STEP = '{desc} [{elapsed}]'
# Of warnings: a deprecation is news for the authors of a package, and MLflow's database has no server.
_IDLE = ('deprecated', 'mlflow server is running')


class _Bar(tqdm):
    """A bar of this process alone: by default bars share a lock with forked processes, and a thread that wakes them."""

    monitor_interval = 0


_Bar.set_lock(threading.RLock())


def tell(text: str, level: int = logging.INFO) -> None:
    """Write a line to the terminal and to the log file; outside a run, to mmengine's current logger."""
    MMLogger.get_current_instance().log(level, text, extra=dict(terminal=True))


@contextmanager
def calm(launcher: str = 'none', verbose: bool = False) -> Iterator[Terminal | None]:
    """Let a run speak through a `Terminal`; with `verbose` there is none, and mmengine writes what it writes.

    What installed packages print, and Python's warnings, which a user cannot do anything about, go to the log file.
    """
    if verbose:
        yield None
        return
    terminal = Terminal(sys.stdout, logging.INFO if is_first(launcher) else logging.ERROR)
    terminal.take(MMLogger.get_current_instance(), early=True)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(1):
            terminal.beat()

    pulse = threading.Thread(target=beat, daemon=True)
    pulse.start()
    try:
        with redirect_stdout(_Prints(terminal)), warnings.catch_warnings():
            warnings.showwarning = _log_warning
            terminal.begin('preparing')
            yield terminal
    finally:
        ended.set()
        # It waits for ever for a bar that was interrupted while it was drawn.
        pulse.join(1)
        terminal.close()


class Terminal(logging.Handler):
    """Lines, and below them what goes on: bars on a terminal, elsewhere a line where one is due or long awaited.

    Args:
        stream: Where to write.
        level: Records below it are not shown, and with one above `INFO` neither is progress.
        patience: Seconds; without a terminal, there is a line at least so often.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        stream: TextIO,
        level: int = logging.INFO,
        patience: float = 30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(level)
        # mmengine's backend for MLflow asks every handler for its stream.
        self.stream, self._patience, self._clock = stream, patience, clock
        self.shows_progress = level <= logging.INFO
        # Some tools open a terminal without a size, which fits no bar.
        self._live = self.shows_progress and stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
        self._last = clock()
        self._bars: list[_Bar] = []
        self._loggers: list[tuple[MMLogger, list[logging.Handler]]] = []
        # What was logged before there was a log file.
        self._early: list[logging.LogRecord] | None = []
        self.addFilter(FilterDuplicateWarning())

    def take(self, logger: MMLogger, early: bool = False) -> None:
        """Take the place of a logger's console handler; unless it is `early`, its files hold the whole run."""
        files = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler) and not early]
        self._loggers.append((logger, logger.handlers))
        logger.handlers = [*files, self]
        if not early:
            for record in self._early or ():
                for file in files:
                    file.handle(record)
            self._early = None

    def calmed(self, kind: type[Runner]) -> type[Runner]:
        """Return a class of runners that give their log to this terminal from the first line on."""

        def build_logger(runner: Runner, *args: Any, **kwargs: Any) -> MMLogger:
            logger = kind.build_logger(runner, *args, **kwargs)
            self.take(logger)
            return logger

        return type(kind.__name__, (kind,), dict(build_logger=build_logger))

    def emit(self, record: logging.LogRecord) -> None:
        if self._early is not None:
            self._early.append(record)
        message = record.getMessage()
        notable = record.levelno >= logging.WARNING and not any(words in message for words in _IDLE)
        if getattr(record, 'terminal', notable):
            self.write(f'{record.levelname.lower()}: {message}' if record.levelno > logging.INFO else message)

    def write(self, text: str) -> None:
        """Write a line, above the bars."""
        assert self.lock is not None
        with self.lock, suppress(OSError):
            # Where the reader went away, the run and its log file go on; bars see to that themselves.
            _Bar.write(text, self.stream)
            self.stream.flush()
        self._last = self._clock()

    def begin(self, what: str, total: int | None = None, done: int = 0) -> None:
        """Begin something, inside of what began before, of so many steps or of unknown length."""
        layout = _STEP if total is None else None if self._live else _LINE
        # Where there is no terminal, its text alone is of use.
        seconds = (0.1, 10.0) if self._live else (inf, inf)
        self._bars.append(
            _Bar(
                desc=what,
                total=total,
                initial=done,
                file=self.stream if self._live else io.StringIO(),
                bar_format=layout,
                dynamic_ncols=True,
                leave=False,
                # The average, validations included, tells best when the end will be.
                smoothing=0,
                mininterval=seconds[0],
                maxinterval=seconds[1],
            )
        )

    def advance(self, done: int, figures: Mapping[str, float] | None = None, due: bool = False) -> None:
        """Tell how far the innermost is; where it is `due` there is a line without a terminal, too."""
        bar = self._bars[-1]
        bar.set_postfix(figures, refresh=False)
        bar.update(done - bar.n)
        if due and not self._live:
            self._say_progress()

    def end(self) -> None:
        """End the innermost."""
        if self._bars:
            self._bars.pop().close()

    def beat(self) -> None:
        """Show that time goes by; to be called every second."""
        if self._live:
            for bar in [*self._bars]:
                bar.refresh()
        elif self._clock() - self._last >= self._patience and self._bars:
            self._say_progress()

    def _say_progress(self) -> None:
        if self.shows_progress:
            self.write(str(self._bars[-1]))

    def close(self) -> None:
        """Remove the bars, and give the loggers their handlers back."""
        while self._bars:
            self.end()
        while self._loggers:
            logger, handlers = self._loggers.pop()
            logger.handlers = handlers
        super().close()


class _Prints:
    """Standard output during a run: what installed packages print goes to the log file, all else to the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._begun = {True: '', False: ''}

    def write(self, text: str) -> int:
        foreign = sys._getframe(1).f_code.co_filename.startswith(_PACKAGES)
        *lines, self._begun[foreign] = (self._begun[foreign] + text).split('\n')
        for line in lines:
            MMLogger.get_current_instance().info(line) if foreign else self._terminal.write(line)
        return len(text)

    def flush(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal.stream, name)


_PACKAGES = tuple({sysconfig.get_path(name) for name in ('purelib', 'platlib')})


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = f'{filename}:{lineno}: {category.__name__}: {message}'
    MMLogger.get_current_instance().warning(text, extra=dict(terminal=False))
