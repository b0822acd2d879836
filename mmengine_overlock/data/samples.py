"""Name the files of a sample that cannot be prepared, which only a run shows."""

from __future__ import annotations

import functools
from typing import Any

from mmengine.dataset import BaseDataset

from mmengine_overlock.data.files import read_image
from overlock.utils.errors import UserError


class BrokenFileError(UserError):
    """A file that was lost or damaged after the check of the data."""

    def __init__(self, message: str) -> None:
        # A worker of a data loader sends its traceback as the message; the sentence is at its end.
        super().__init__(message.rstrip().rpartition(f'{type(self).__name__}: ')[2])


class SampleError(RuntimeError):
    """A sample that fails in the pipeline although its files are whole."""


def name_samples() -> None:
    """Make mmengine's data sets name the files of a sample that fails; a second call changes nothing."""
    prepare = BaseDataset.prepare_data
    if hasattr(prepare, 'names_files'):
        return

    @functools.wraps(prepare)
    def prepare_data(self: BaseDataset, idx: int) -> Any:
        try:
            return prepare(self, idx)
        except Exception as error:
            info = self.get_data_info(idx)
            paths = [str(info[key]) for key in ('img_path', 'seg_map_path') if info.get(key)]
            for path in paths:
                if '://' not in path and (problem := read_image(path, pixels=True).problem):
                    raise BrokenFileError(
                        f'{path} {problem}; restore it and continue with --resume, or remove it from the data set.'
                    ) from None
            raise SampleError(f'{", ".join(paths) or f"sample {idx}"}: {type(error).__name__}: {error}') from error

    prepare_data.names_files = True  # type: ignore[attr-defined]
    BaseDataset.prepare_data = prepare_data
