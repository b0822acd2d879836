"""Check the data sets before a run: repair what can be repaired, and say the rest in one message.

Data sets that mmdet's CocoDataset and mmseg's BaseSegDataset read are checked, any other is left to its own class, and
so is remote storage.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

from mmengine.config import Config

from mmengine_overlock.config import SPLITS, nodes
from mmengine_overlock.data.cache import Outcome
from mmengine_overlock.data.classes import read_classes
from mmengine_overlock.data.findings import REFUSED, REPAIRED, Finding, write_list
from mmengine_overlock.data.layouts import check_dataset, dataset_class, is_local
from mmengine_overlock.launch import is_first
from mmengine_overlock.terminal import tell
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
    outcomes = examine(cfg, *splits)
    findings = {split: outcome.findings for split, outcome in outcomes.items()}
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
    for split, outcome in outcomes.items() if local_rank() == 0 else ():
        if outcome.statistics.images:
            tell(f'The {split} data set: {outcome.statistics}.')
        if outcome.findings:
            level = logging.WARNING if any(record.outcome == REPAIRED for record in outcome.findings) else logging.INFO
            text = '; '.join(record.brief() for record in outcome.findings)
            tell(f'The {split} data set: {text}. {work_dir / LISTING} lists them.', level)
    return findings


def examine(cfg: Config, *splits: str) -> dict[str, Outcome]:
    """Check the data sets of a configuration, and change it to what repairs them.

    Args:
        cfg: The configuration, changed in place.
        splits: Which of 'train', 'val' and 'test'.

    Returns:
        What was found, by split, of all its data sets together.
    """
    parts = {split: [node for node in nodes(cfg.get(f'{split}_dataloader')) if is_local(node)] for split in SPLITS}
    trained = [read_classes(dataset, dataset_class(cfg, dataset), defaultdict(list)) for dataset in parts['train']]
    outcomes = {}
    for split in splits:
        outcome = outcomes[split] = Outcome()
        for dataset in parts[split]:
            evaluators = list(nodes(cfg.get(f'{split}_evaluator')))
            checked = check_dataset(cfg, dataset, evaluators, trained[0] if trained else None)
            outcome.findings += checked.findings
            outcome.statistics += checked.statistics
    return outcomes


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
