"""Report what a data set has and what is wrong with it: as text and as JSON; `report_html` writes it with pictures."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmengine_overlock.config import SPLITS, nodes
from mmengine_overlock.data import examine
from mmengine_overlock.data.cache import Outcome
from mmengine_overlock.data.find_coco import find_coco
from mmengine_overlock.data.find_masks import NAME_FILES, find_masks
from mmengine_overlock.data.findings import REFUSED
from mmengine_overlock.data.folders import DataFolder
from mmengine_overlock.data.layouts import is_local
from mmengine_overlock.data.statistics import Statistics
from overlock.utils.errors import UserError

_BOXES = ('boxes', 'small', 'medium', 'large')


@dataclass
class Report:
    """What the data sets of a configuration have.

    Attributes:
        source: A folder, or a configuration.
        cfg: The configuration, with the repairs that a run makes.
        outcomes: Of the check, by split.
        remarks: What was decided where the source is a folder, in sentences.
    """

    source: str
    cfg: Config
    outcomes: dict[str, Outcome]
    remarks: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether a run would start."""
        return not any(record.outcome == REFUSED for outcome in self.outcomes.values() for record in outcome.findings)

    @property
    def classes(self) -> list[str]:
        """The classes of all splits, in the order of their labels."""
        return list(dict.fromkeys(name for outcome in self.outcomes.values() for name in outcome.statistics.classes))

    @property
    def labeled(self) -> list[str]:
        """The classes that an image shows."""
        statistics = [outcome.statistics for outcome in self.outcomes.values()]
        return [name for name in self.classes if any(each.classes.get(name, {}).get('images') for each in statistics)]

    @property
    def verdict(self) -> str:
        return 'ready to train' if self.usable else 'not ready: correct what is refused'

    def datasets(self, split: str) -> list[dict]:
        """Return the settings of the data sets of a split."""
        return [node for node in nodes(self.cfg[f'{split}_dataloader']) if is_local(node)]

    def overview(self) -> list[list[str]]:
        """Return a table: what there is, by split."""
        statistics = [outcome.statistics for outcome in self.outcomes.values()]
        rows = [['', *self.outcomes]]
        rows.append(['images', *(f'{each.images:,}' for each in statistics)])
        rows.append(['  without labels', *(f'{each.unlabeled:,}' for each in statistics)])
        if any(each.total('boxes') for each in statistics):
            rows += [
                ['  ' * (what != 'boxes') + what, *(f'{each.total(what):,}' for each in statistics)] for what in _BOXES
            ]
            if any(each.crowds for each in statistics):
                rows.append(['crowds, not among these', *(f'{each.crowds:,}' for each in statistics)])
        else:
            pixels = [each.total('pixels') + each.ignored for each in statistics]
            shares = [each.ignored / max(whole, 1) for each, whole in zip(statistics, pixels, strict=True)]
            rows.append(['pixels without a class', *(f'{share:.1%}' for share in shares)])
        rows.append(['image sizes', *(each.smallest_and_largest or '-' for each in statistics)])
        rows.append(['  most frequent', *(_most_frequent(each) for each in statistics)])
        return rows

    def by_class(self) -> list[list[str]]:
        """Return a table of the labeled classes: boxes of each split and their sizes in the first, or pixels."""
        splits = {split: outcome.statistics for split, outcome in self.outcomes.items()}
        first, statistics = next(iter(splits.items()))
        if any(each.total('boxes') for each in splits.values()):
            rows = [['class', *splits, f'{first}: images', *_BOXES[1:]]]
            for name in self.labeled:
                counts = [each.classes.get(name, {}).get('boxes', 0) for each in splits.values()]
                counts += [statistics.classes.get(name, {}).get(what, 0) for what in ('images', *_BOXES[1:])]
                rows.append([name, *(f'{count:,}' if count else '-' for count in counts)])
            return rows
        rows = [['class', *(f'{split}: {what}' for split in splits for what in ('images', 'pixels'))]]
        for name in self.labeled:
            row = [name]
            for each in splits.values():
                images, pixels = (each.classes.get(name, {}).get(what, 0) for what in ('images', 'pixels'))
                row += [f'{images:,}', f'{pixels / each.total("pixels"):.2%}'] if images else ['-', '-']
            rows.append(row)
        return rows

    def text(self) -> str:
        """Return the report for a terminal."""
        lines = [self.source, '', *columns(self.overview()), '', *columns(self.by_class()), '']
        lost = len(self.classes) - len(self.labeled)
        lines += [f'{lost} of {len(self.classes)} classes have no labels.', ''] if lost else []
        lines += [*self.remarks, ''] if self.remarks else []
        for split, outcome in self.outcomes.items():
            for record in outcome.findings:
                lines.append(f'{split}, {record.outcome}: {record}')
        return '\n'.join([*lines, self.verdict])

    def json(self) -> str:
        """Return all counts and findings, with every item, as JSON."""
        parts = {
            split: asdict(outcome.statistics) | dict(findings=[asdict(record) for record in outcome.findings])
            for split, outcome in self.outcomes.items()
        }
        content = dict(source=self.source, usable=self.usable, classes=self.classes, remarks=self.remarks, splits=parts)
        return json.dumps(content, ensure_ascii=False, indent=1)


def report_folder(root: str | Path) -> Report:
    """Report a folder in one of the layouts that `find_coco` and `find_masks` know.

    Raises:
        UserError: The folder does not exist or has neither layout.
    """
    found = _find(Path(root))
    scope = 'mmdet' if found.layout == 'coco' else 'mmseg'
    load = dict(with_bbox=True, with_mask=found.masks) if found.layout == 'coco' else {}
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', **load)]
    datasets = {split: found.dataset(split) | dict(pipeline=deepcopy(pipeline)) for split in found.parts}
    loaders = {f'{split}_dataloader': dict(dataset=dataset) for split, dataset in datasets.items()}
    cfg = Config(dict(default_scope=scope, **loaders))
    return Report(str(found.root), cfg, examine(cfg, *found.parts), found.remarks)


def report_config(cfg: Config) -> Report:
    """Report the data sets of a configuration, which stays as it is; test data that are the validation's once.

    Raises:
        UserError: It has none that can be checked.
    """
    cfg = deepcopy(cfg)
    splits = [split for split in SPLITS if any(map(is_local, nodes(cfg.get(f'{split}_dataloader'))))]
    if 'val' in splits and 'test' in splits and _paths(cfg, 'val') == _paths(cfg, 'test'):
        splits.remove('test')
    if not splits:
        raise UserError(f'{cfg.filename} has no data set of COCO annotations or label maps in a folder to report.')
    return Report(str(cfg.filename), cfg, examine(cfg, *splits))


def _most_frequent(statistics: Statistics) -> str:
    if not statistics.sizes:
        return '-'
    width, height, count = statistics.sizes[0]
    return f'{width}x{height} ({count / statistics.images:.0%})'


def _paths(cfg: Config, split: str) -> list[tuple[Any, ...]]:
    datasets = [node for node in nodes(cfg[f'{split}_dataloader']) if is_local(node)]
    return [(node.get('data_root'), node.get('ann_file'), dict(node['data_prefix'])) for node in datasets]


def _find(root: Path) -> DataFolder:
    files = [path for pattern in ('*.json', '*/*.json') for path in root.glob(pattern)]
    return find_coco(root) if any(path.name not in NAME_FILES for path in files) else find_masks(root)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    padded = [[' ' * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return [
        '  '.join([row[0] + spaces[0], *(space + cell for cell, space in zip(row[1:], spaces[1:], strict=True))])
        for row, spaces in zip(rows, padded, strict=True)
    ]


def _width(text: str) -> int:
    """Return how many places of a terminal a text takes: East Asian letters take two, marks on others none."""
    return sum(
        0 if unicodedata.category(letter) in ('Mn', 'Me', 'Cf') else 1 + (unicodedata.east_asian_width(letter) in 'WF')
        for letter in text
    )
