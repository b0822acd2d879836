"""Check the data sets before a run, so that a wrong path is one sentence instead of a traceback."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS

from mmengine_overlock.config import nodes
from overlock.utils.errors import UserError


def check_data(cfg: Config, *splits: str) -> None:
    """Check that the data sets and evaluators of a run find their files, and that these are not empty.

    Data sets in COCO's and ADE20K's layouts are checked, any other is left to its own class, and so is remote storage.

    Args:
        cfg: Configuration of the run.
        splits: Which of 'train', 'val' and 'test' the run uses.

    Raises:
        UserError: Files are missing, empty or of another format; the message gives the expected layout.
    """
    for split in splits:
        evaluators = list(nodes(cfg.get(f'{split}_evaluator')))
        labeled = not any(evaluator.get('format_only') for evaluator in evaluators)
        for dataset in nodes(cfg.get(f'{split}_dataloader')):
            problem = _problem(dataset, cfg.get('default_scope', 'mmengine'), labeled)
            if problem:
                raise UserError(f'The {split} data set cannot be used: {problem}.')
        for path in (evaluator.get('ann_file') for evaluator in evaluators):
            if path and '://' not in path and not Path(path).is_file():
                raise UserError(
                    f'The annotation file {path} of {split}_evaluator does not exist; give the folder of '
                    'the data with --data-root DIR.'
                )


def _problem(dataset: dict, scope: str, labeled: bool) -> str | None:
    """Return why a data set cannot be used, with the remedy; None for one without problems, or without files."""
    root, prefix = dataset.get('data_root') or '', dataset.get('data_prefix') or {}
    maps = 'seg_map_path' in prefix
    coco = 'img' in prefix and str(dataset.get('ann_file')).endswith('.json')
    remote = any('://' in str(path) for path in (root, dataset.get('ann_file'), *prefix.values()))
    if remote or not (maps or coco):
        return None
    kind = DATASETS.get(dataset['type'] if '.' in dataset['type'] else f'{scope}.{dataset["type"]}')
    if maps:
        problem, layout = _maps_problem(dataset, Path(root), kind)
    else:
        problem, layout = _coco_problem(dataset, Path(root), kind, labeled)
    return problem and f'{problem}; expected {layout}, below {root or "."}, which --data-root DIR replaces'


def _coco_problem(dataset: dict, root: Path, kind: type | None, labeled: bool) -> tuple[str | None, str]:
    """Return what is wrong with an annotation file and its images, if anything, and their expected layout."""
    ann_file, folder = root / dataset['ann_file'], root / dataset['data_prefix']['img']
    layout = f"{dataset['ann_file']} in COCO's format and its images in {dataset['data_prefix']['img']}"
    for path in (ann_file, folder):
        if not path.exists():
            return f'{path} does not exist', layout
    try:
        content = json.loads(ann_file.read_bytes())
    except ValueError as error:
        return f'{ann_file} is not JSON ({error})', layout
    for key in ('images', 'categories', *(['annotations'] if labeled else [])):
        if not isinstance(content, dict) or not content.get(key):
            return f'{ann_file} has no {key}', layout
    first = content['images'][0].get('file_name', '')
    if not (folder / first).exists():
        return f'{first}, the first image of {ann_file.name}, is not in {folder}', layout
    # mmdet drops the categories that it does not know, even if none is left.
    categories = [category.get('name') for category in content['categories']]
    classes = (dataset.get('metainfo') or {}).get('classes') or getattr(kind, 'METAINFO', {}).get('classes')
    if isinstance(classes, (list, tuple)) and not set(classes) & set(categories):
        theirs, ours = (', '.join(map(str, names[:3])) + ', ...' * (len(names) > 3) for names in (categories, classes))
        remedy = 'set `metainfo = dict(classes=(...))` in the data set to the names in the file'
        return f'no category of {ann_file} ({theirs}) is one of its classes ({ours}): {remedy}', layout
    return None, layout


def _maps_problem(dataset: dict, root: Path, kind: type | None) -> tuple[str | None, str]:
    """Return what is wrong with images and label maps, if anything, and their expected layout."""
    names = dataset['data_prefix']['img_path'], dataset['data_prefix']['seg_map_path']
    defaults = inspect.signature(kind).parameters if kind else {}
    suffixes = [
        str(dataset.get(option) or getattr(defaults.get(option), 'default', fallback))
        for option, fallback in (('img_suffix', '.jpg'), ('seg_map_suffix', '.png'))
    ]
    layout = f'images {names[0]}/*{suffixes[0]} and, by the same names, label maps {names[1]}/*{suffixes[1]}'
    folders = [root / name for name in names]
    for folder in folders:
        if not folder.is_dir():
            return f'{folder} does not exist', layout
    images, maps = (
        {str(path.relative_to(folder)).removesuffix(suffix) for path in folder.rglob(f'*{suffix}')}
        for folder, suffix in zip(folders, suffixes, strict=True)
    )
    if not images:
        return f'{folders[0]} has no images *{suffixes[0]}', layout
    # An annotation file lists the images that count.
    if images - maps and not dataset.get('ann_file'):
        first = min(images - maps)
        return f'{len(images - maps)} of {len(images)} images have no label map, first {first}{suffixes[0]}', layout
    return None, layout
