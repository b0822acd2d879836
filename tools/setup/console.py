"""Run the commands of a set-up: output into a log, one line of live progress, the telling lines of what failed."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path


class SetupError(Exception):
    """The set-up failed; the message tells the user why."""


def progress(output: str, seconds: float) -> str:
    """Return one line on how long a command has run and, by ninja's last count in its output, how far it is."""
    elapsed = f'{timedelta(seconds=int(seconds))} elapsed'
    counts = re.findall(r'^\s*\[(\d+)/(\d+)\]', output, re.M)
    return f'{counts[-1][0]} of {counts[-1][1]} files compiled, {elapsed}' if counts else elapsed


def excerpt(output: str) -> str:
    """Return the first errors in the output of a failed command and its last lines, cut in width."""
    lines = output.splitlines()
    errors = [line for line in lines[:-10] if re.search(r'\berror\b', line, re.I)][:5]
    return '\n'.join(f'    {line.strip()[:200]}' for line in [*errors, *(['...'] if errors else []), *lines[-10:]])


def run(command: list[str], log: Path, variables: Mapping[str, str] | None = None, every: float = 30.0) -> str:
    """Run a command, append its output to the log, and return it; raise `SetupError` if the command fails."""
    terminal, start, begin = sys.stdout.isatty(), time.monotonic(), log.stat().st_size
    with open(log, 'ab') as stream:
        environ = {**os.environ, **(variables or {})}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environ, start_new_session=True
        )
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5 if terminal else every)
                break
            line = '    ' + progress(log.read_bytes()[begin:].decode(errors='replace'), time.monotonic() - start)
            rewritten = f'\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}'
            print(rewritten if terminal else f'{line}\n', end='', flush=True)
    except BaseException:
        # The command's own children too: compilers must not outlive an interrupted pip.
        os.killpg(process.pid, signal.SIGTERM)
        raise
    print('\r\x1b[K' if terminal else '', end='', flush=True)
    output = log.read_bytes()[begin:].decode(errors='replace')
    if process.returncode:
        raise SetupError(
            f'`{shlex.join(command)[:300]}` failed with exit status {process.returncode}:\n{excerpt(output)}\n'
            f'The complete log is {log}. Run the same command again to continue.'
        )
    return output
