"""Remember the outcome of a check until a file changes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from mmengine_overlock.data.files import scan
from mmengine_overlock.data.findings import Finding
from mmengine_overlock.data.statistics import Statistics
from overlock.utils.files import whole_file


@dataclass
class Outcome:
    """The outcome of the check of a data set.

    Attributes:
        findings: What was found.
        ann_file: Repaired copy of the annotation file, or ''.
        ignore_orientation: Whether the run has to load images without EXIF's rotation.
        statistics: What the data set has, as far as it could be read.
    """

    findings: list[Finding] = field(default_factory=list)
    ann_file: str = ''
    ignore_orientation: bool = False
    statistics: Statistics = field(default_factory=Statistics)


Files = dict[str, tuple[int, int]]


def remember(
    check: Callable[[list[Files], Path], Outcome], paths: Iterable[Path], settings: Any, work_dir: Path
) -> Outcome:
    """Return the outcome of an earlier check of the same files with the same settings, else of a new one.

    Processes of one machine wait for each other, so that one of them checks for all.

    Args:
        check: Takes the files below `paths`, as `scan` gives them, and a name for the repaired copy.
        paths: Files and folders of the data set.
        settings: What else the outcome depends on.
        work_dir: Keeps the outcome where the cache folder cannot be written to.
    """
    key = hashlib.sha256(repr([platform.node(), [str(path.absolute()) for path in paths], settings]).encode())
    path = _folder(work_dir) / f'{key.hexdigest()[:16]}.json'
    with FileLock(path.with_suffix('.lock')):
        files = [scan(path) for path in paths]
        sources = [(path.name, path.stat().st_mtime_ns) for path in sorted(Path(__file__).parent.glob('*.py'))]
        state = repr([sources, [sorted(found.items()) for found in files]])
        stamp = hashlib.sha256(state.encode('utf-8', 'surrogateescape')).hexdigest()
        try:
            known = json.loads(path.read_bytes())
        except (OSError, ValueError):
            known = {}
        if known.get('stamp') == stamp and (not known['ann_file'] or Path(known['ann_file']).is_file()):
            findings = [Finding(**finding) for finding in known['findings']]
            statistics = Statistics(**known['statistics'])
            return Outcome(findings, known['ann_file'], known['ignore_orientation'], statistics)
        outcome = check(files, path.with_suffix('.annotations.json'))
        with whole_file(path) as file:
            file.write(json.dumps({'stamp': stamp, **asdict(outcome)}).encode())
        return outcome


def _folder(work_dir: Path) -> Path:
    """Return the first folder that can be written to: the cache, else one of the run."""
    cache = os.environ.get('OVERLOCK_CACHE') or os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'overlock')
    try:
        # A RuntimeError where the user has no home.
        folder = Path(cache).expanduser() / 'data'
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return work_dir / 'data_check'
    return folder if os.access(folder, os.W_OK) else work_dir / 'data_check'
