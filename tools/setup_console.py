"""What the user of a set-up sees: numbered steps, live progress, failures with the lines that tell most."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO


class SetupError(Exception):
    """What stopped the set-up, in words for the user."""


class Progress:
    """One line about a running command, from what it printed last.

    Args:
        now: The time in seconds at which the command starts.
    """

    NINJA = re.compile(r'\s*\[(\d+)/(\d+)\]')
    PIP = re.compile(r'\s*(Collecting|Downloading|Using cached|Building wheel|Installing collected)\b')

    def __init__(self, now: float) -> None:
        self.start = now
        self.doing = ''
        self.first = (0, 0.0)
        self.done = self.total = 0

    def feed(self, line: str, now: float) -> None:
        """Takes a line of the command's output, printed at `now`."""
        ninja = self.NINJA.match(line)
        if ninja:
            self.done, self.total = int(ninja[1]), int(ninja[2])
            self.first = self.first if self.first[0] else (self.done, now)
        elif self.PIP.match(line):
            self.doing = textwrap.shorten(line, 80, placeholder=' ...')

    def text(self, now: float) -> str:
        """Returns files, percentage, elapsed and remaining time of a compilation, or pip's present doing."""
        elapsed = f'{minutes(now - self.start)} elapsed'
        if not self.total:
            return f'{elapsed}  {self.doing}'.rstrip()
        line = f'{self.done}/{self.total} files  {100 * self.done // self.total}%  {elapsed}'
        done, since = self.done - self.first[0], now - self.first[1]
        return f'{line}, about {minutes(since / done * (self.total - self.done))} left' if done else line


def minutes(seconds: float) -> str:
    """Returns a duration as m:ss."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def excerpt(lines: list[str]) -> str:
    """Returns the lines of a failed command that tell most: its first errors, then its last lines, cut in width."""
    errors = [line for line in lines[:-10] if re.search(r'\b(fatal )?error\b', line, re.I)][:5]
    return '\n'.join(f'    {line.strip()[:200]}' for line in [*errors, *(['...'] if errors else []), *lines[-10:]])


class Console:
    """Numbered steps, and commands whose output goes to a log while one line shows how far they are.

    Args:
        log: File that gets everything the commands print.
        out: Where the user reads.
        every: Seconds between two lines of progress where `out` is no terminal.
    """

    STEPS = 6

    def __init__(self, log: Path, out: TextIO = sys.stdout, every: float = 30.0) -> None:
        self.log, self.out, self.every = log, out, every
        self.count = 0
        log.write_text('')

    def note(self, text: str) -> None:
        """Tells something beside the steps."""
        print(f'      {text}', file=self.out, flush=True)

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Announces a step and, when it is over, the time that it took."""
        self.count += 1
        print(f'[{self.count}/{self.STEPS}] {text}', file=self.out, flush=True)
        start = time.monotonic()
        yield
        self.note(f'done in {minutes(time.monotonic() - start)}')

    def run(self, command: list[str], variables: Mapping[str, str] | None = None) -> None:
        """Runs a command to its end.

        Args:
            command: Program and arguments.
            variables: Environment variables beside those of this process.

        Raises:
            SetupError: If the command fails.
        """
        progress = Progress(time.monotonic())
        lines: list[str] = []
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            env={**os.environ, **(variables or {})},
            start_new_session=True,
        )
        reader = threading.Thread(target=self._read, args=(process.stdout, lines, progress, command), daemon=True)
        try:
            reader.start()
            self._watch(reader, progress)
            code = process.wait()
        except BaseException:
            # The command's own children too: compilers must not outlive an interrupted pip.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise
        if code:
            raise SetupError(
                f'`{shlex.join(command)[:300]}` failed with exit status {code}:\n{excerpt(lines)}\n'
                f'The complete log is {self.log}. Run the same command again to go on from here.'
            )

    def _read(self, stream: TextIO, lines: list[str], progress: Progress, command: list[str]) -> None:
        with stream, open(self.log, 'a', buffering=1) as log:
            log.write(f'\n$ {shlex.join(command)}\n')
            for line in stream:
                log.write(line)
                lines.append(line)
                progress.feed(line, time.monotonic())

    def _watch(self, reader: threading.Thread, progress: Progress) -> None:
        terminal, last = self.out.isatty(), time.monotonic()
        while reader.is_alive():
            reader.join(0.5)
            now = time.monotonic()
            if terminal:
                width = shutil.get_terminal_size().columns - 1
                self.out.write(f'\r\x1b[K{f"      {progress.text(now)}"[:width]}')
                self.out.flush()
            elif now - last >= self.every:
                self.note(progress.text(now))
                last = now
        if terminal:
            self.out.write('\r\x1b[K')
