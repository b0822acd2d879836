"""Check the data sets before a run: repair what can be repaired, and say the rest in one message.

Data sets that mmdet's CocoDataset and mmseg's BaseSegDataset read are checked, any other is left to its own class, and
so is remote storage.
"""

from __future__ import annotations

import logging
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from mmengine_overlock.config import nodes
from mmengine_overlock.data.findings import REFUSED, REPAIRED, Finding, write_list
from mmengine_overlock.data.layouts import check_dataset, is_local
from mmengine_overlock.launch import is_first
from overlock.utils.distributed import local_rank
from overlock.utils.errors import UserError

LISTING = 'data_check.txt'


def check_data(cfg: Config, *splits: str) -> dict[str, list[Finding]]:
    """Check the data sets and evaluators of a run.

    Where data can be repaired, the configuration is changed in place: to a repaired copy of the annotation file, or to
    images loaded without EXIF's rotation. Everything found is listed in `data_check.txt` in the work folder.

    Args:
        cfg: Configuration of the run.
        splits: Which of 'train', 'val' and 'test' the run uses.

    Returns:
        What was found, by split.

    Raises:
        UserError: Data cannot be used; the message says what of all splits, and what was expected.
    """
    work_dir = Path(cfg.get('work_dir') or '.')
    findings: dict[str, list[Finding]] = {}
    for split in splits:
        evaluators = list(nodes(cfg.get(f'{split}_evaluator')))
        datasets = [dataset for dataset in nodes(cfg.get(f'{split}_dataloader')) if is_local(dataset)]
        findings[split] = [finding for dataset in datasets for finding in check_dataset(cfg, dataset, evaluators)]
    listed = {split: records for split, records in findings.items() if any(record.items for record in records)}
    problems = [_sentence(split, records, work_dir / LISTING) for split, records in findings.items()]
    # Machines may share the folder: the others write what ends the run alone.
    if listed and (is_first(cfg.get('launcher', 'none')) or (any(problems) and local_rank() == 0)):
        write_list(work_dir / LISTING, listed)
    if any(problems):
        raise UserError(' '.join(filter(None, problems)))
    for split in splits:
        for path in (evaluator.get('ann_file') for evaluator in nodes(cfg.get(f'{split}_evaluator'))):
            if path and '://' not in path and not Path(path).is_file():
                raise UserError(
                    f'The annotation file {path} of {split}_evaluator does not exist; give the folder of '
                    'the data with --data-root DIR.'
                )
    for split, records in findings.items():
        text = '; '.join(f'{record.message} ({record.count})' for record in records)
        if text and local_rank() == 0:
            level = logging.WARNING if any(record.outcome == REPAIRED for record in records) else logging.INFO
            print_log(f'The {split} data set: {text}. {work_dir / LISTING} lists them.', 'current', level)
    return findings


def _sentence(split: str, records: list[Finding], listing: Path) -> str:
    """Return why the data of a split cannot be used, with the remedy, or ''."""
    refused = [record for record in records if record.outcome == REFUSED]
    if not refused:
        return ''
    # The others tell why nothing is left.
    shown = records if any(record.kind == 'unusable' for record in refused) else refused
    text = f'The {split} data set cannot be used: {"; ".join(map(str, shown))}'
    if any(record.items for record in shown):
        text += f'; {listing} lists all; correct them, or give --no-check to use the data as they are'
    return f'{text}.'
