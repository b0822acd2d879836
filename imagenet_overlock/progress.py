"""What a run tells while it goes on."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import timedelta
from statistics import fmean

from tqdm import tqdm

from imagenet_overlock.distributed import is_first_process

_logger = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


class Eta:
    """How long a run will still take, from the means of its updates and validations so far.

    Args:
        updates: Updates left, at the start.
        validations: Validations left, at the start.
    """

    def __init__(self, updates: int, validations: int) -> None:
        self._left = {'update': updates, 'validation': validations}
        self._seconds = {'update': deque(maxlen=1000), 'validation': deque(maxlen=10)}

    def add(self, kind: str, seconds: float) -> None:
        """Counts an 'update' or a 'validation' that took so long."""
        self._left[kind] -= 1
        self._seconds[kind].append(seconds)

    def seconds(self) -> float:
        """The time left; before the first validation that of updates alone."""
        return sum(self._left[kind] * fmean(times) for kind, times in self._seconds.items() if times)


class EpochProgress:
    """A bar on a terminal, log lines elsewhere; nothing in other processes than the first.

    Args:
        title: What the bar or the lines begin with.
        updates: Updates of an epoch.
        images: Images of an update, in all processes.
        eta: Of the whole run.
        shown: Whether this is the process that tells.
    """

    def __init__(self, title: str, updates: int, images: int, eta: Eta, shown: bool) -> None:
        self.title, self.updates, self.images, self.eta = title, updates, images, eta
        self.on_terminal = shown and sys.stderr.isatty()
        self.logs = shown and not self.on_terminal
        self.rate = 0.0

    def __iter__(self) -> Iterator[int]:
        """Counts the updates of the epoch from 1 and measures what is done between two of them."""
        last = time.perf_counter()
        # Workers start and kernels are chosen in the first update: the rate leaves it out where there are others.
        begin, skipped = last, 0
        with tqdm(
            total=self.updates,
            desc=self.title,
            leave=False,
            disable=not self.on_terminal,
            unit='update',
            dynamic_ncols=True,
        ) as self.bar:
            for update in range(1, self.updates + 1):
                yield update
                now = time.perf_counter()
                self.eta.add('update', now - last)
                self.rate = (update - skipped) * self.images / (now - begin)
                if update == 1 and self.updates > 1:
                    begin, skipped = now, 1
                last = now
                self.bar.update()

    def tell(self, update: int, loss: float, lr: float) -> None:
        """Shows the loss since the last time; `update` counts from 1 in the epoch."""
        # The first update is told before it is measured.
        rate, left = (f'{self.rate:.1f}', duration(self.eta.seconds())) if self.rate else ('?', '?')
        self.bar.set_postfix_str(f'loss {loss:.3f}, {rate} images/s, run ends in {left}')
        if self.logs:
            _logger.info(
                '%s, update %d/%d: loss %.3f, lr %.2e, %s images/s, ETA %s',
                self.title,
                update,
                self.updates,
                loss,
                lr,
                rate,
                left,
            )


def epoch_line(row: Mapping[str, float], epochs: int, eta: Eta) -> str:
    """The figures of an epoch, as `imagenet_overlock.train` writes them into summary.csv, as one line."""
    heads = ''
    if 'train_loss_aux' in row:
        heads = f' (main {row["train_loss_main"]:.3f}, aux {row["train_loss_aux"]:.3f})'
    parts = [
        f'epoch {row["epoch"] + 1}/{epochs}: lr {row["lr"]:.2e}',
        f'loss {row["train_loss"]:.3f}{heads}',
        f'validation loss {row["val_loss"]:.3f}',
    ]
    named = {'val_top1': 'top-1', 'val_top5': 'top-5', 'val_aux_top1': 'aux top-1', 'val_ema_top1': 'EMA top-1'}
    parts += [f'{text} {row[name]:.2f}' for name, text in named.items() if name in row]
    parts += [
        f'{row["train_images_per_second"]:.1f} images/s',
        duration(row['seconds']),
        f'ETA {duration(eta.seconds())}',
    ]
    return ', '.join(parts)


def log_to_terminal() -> None:
    """Sends the log of this package and of overlock to stderr; of the processes of a run that of the first alone."""
    level = logging.INFO if is_first_process() else logging.ERROR
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
    for name in ('imagenet_overlock', 'overlock'):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
