"""Check the data sets before a run, so that a wrong path is one sentence instead of a traceback."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS

from mmengine_overlock.config import as_list
from overlock.utils.errors import UserError


class _Unusable(Exception):
    """A data set cannot be used; the message gives the reason and the remedy."""


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise _Unusable(problem)


def check_data(cfg: Config, *splits: str) -> None:
    """Check that the data sets and evaluators of a run find their files, and that these are not empty.

    Data sets in COCO's and ADE20K's layouts are checked, any other is left to its own class, and so is remote storage.

    Args:
        cfg: Configuration of the run.
        splits: Which of 'train', 'val' and 'test' the run uses.

    Raises:
        UserError: Files are missing, empty or of another format; the message gives the expected layout.
    """
    checked: list[dict] = []
    for split in splits:
        evaluators = as_list(cfg.get(f'{split}_evaluator'))
        labeled = not any(evaluator.get('format_only') for evaluator in evaluators)
        for dataset in _leaves((cfg.get(f'{split}_dataloader') or {}).get('dataset')):
            if dataset not in checked:
                checked.append(dataset)
                try:
                    _check(dataset, cfg.get('default_scope', 'mmengine'), labeled)
                except _Unusable as error:
                    raise UserError(f'The {split} data set cannot be used: {error}.') from error
        for evaluator in evaluators:
            path = evaluator.get('ann_file')
            if path and not _is_remote(path) and not Path(path).is_file():
                raise UserError(
                    f'The annotation file {path} of {split}_evaluator does not exist; give the folder of '
                    'the data with --data-root DIR.'
                )


def _leaves(dataset: dict | None) -> Iterator[dict]:
    """Yield the data sets inside RepeatDataset, ConcatDataset and other wrappers."""
    inner = (dataset or {}).get('dataset', (dataset or {}).get('datasets'))
    for item in as_list(inner):
        yield from _leaves(item)
    if dataset and inner is None:
        yield dataset


def _check(dataset: dict, scope: str, labeled: bool) -> None:
    prefix = dataset.get('data_prefix') or {}
    maps = 'seg_map_path' in prefix
    coco = 'img' in prefix and str(dataset.get('ann_file')).endswith('.json')
    remote = any(map(_is_remote, (dataset.get('data_root'), dataset.get('ann_file'), *prefix.values())))
    if remote or not (maps or coco):
        return
    kind = DATASETS.get(dataset['type'] if '.' in dataset['type'] else f'{scope}.{dataset["type"]}')
    if maps:
        _check_maps(dataset, kind)
    else:
        _check_coco(dataset, kind, labeled)


def _is_remote(path: object) -> bool:
    return '://' in str(path)


def _layout(dataset: dict, expected: str) -> str:
    root = dataset.get('data_root')
    return f'expected {expected}' + (f', below {root}, which --data-root DIR replaces' if root else '')


def _check_coco(dataset: dict, kind: type | None, labeled: bool) -> None:
    names = dataset['ann_file'], dataset['data_prefix']['img']
    ann_file, folder = (Path(dataset.get('data_root') or '', name) for name in names)
    layout = _layout(dataset, f"{names[0]} in COCO's format and its images in {names[1]}")
    _require(ann_file.is_file(), f'{ann_file} does not exist; {layout}')
    try:
        content = json.loads(ann_file.read_bytes())
    except ValueError as error:
        problem = f'not JSON ({error})' if ann_file.stat().st_size else 'empty'
        raise _Unusable(f'{ann_file} is {problem}; {layout}') from error
    if not isinstance(content, dict):
        raise _Unusable(f"{ann_file} holds a JSON {type(content).__name__}, not the dict of COCO's format; {layout}")
    for key in ('images', 'categories', *(['annotations'] if labeled else [])):
        _require(content.get(key), f'{ann_file} has no {key}; {layout}')
    _require(folder.is_dir(), f'{folder} does not exist; {layout}')
    first = content['images'][0].get('file_name')
    found = not first or (folder / first).is_file()
    _require(found, f'{first}, the first image of {ann_file.name}, is not in {folder}; {layout}')
    # mmdet drops the categories that it does not know, even if none is left.
    categories = [category.get('name') for category in content['categories']]
    classes = (dataset.get('metainfo') or {}).get('classes') or getattr(kind, 'METAINFO', {}).get('classes')
    if isinstance(classes, (list, tuple)) and not set(classes) & set(categories):
        raise _Unusable(
            f'no category of {ann_file} ({_some(categories)}) is one of its classes ({_some(classes)}); '
            'set `metainfo = dict(classes=(...))` in the data set to the names in the file'
        )


def _some(names: list | tuple) -> str:
    return ', '.join(map(str, names[:3])) + (', ...' if len(names) > 3 else '')


def _check_maps(dataset: dict, kind: type | None) -> None:
    names = dataset['data_prefix']['img_path'], dataset['data_prefix']['seg_map_path']
    folders = [Path(dataset.get('data_root') or '', name) for name in names]
    defaults = inspect.signature(kind).parameters if kind else {}
    suffixes = [
        str(dataset.get(option) or getattr(defaults.get(option), 'default', fallback))
        for option, fallback in (('img_suffix', '.jpg'), ('seg_map_suffix', '.png'))
    ]
    expected = 'images {0}/*{2} and, by the same names, label maps {1}/*{3}'
    layout = _layout(dataset, expected.format(*names, *suffixes))
    for folder in folders:
        _require(folder.is_dir(), f'{folder} does not exist; {layout}')
    images, maps = (
        {str(path.relative_to(folder)).removesuffix(suffix) for path in folder.rglob(f'*{suffix}')}
        for folder, suffix in zip(folders, suffixes, strict=True)
    )
    _require(images, f'{folders[0]} has no images *{suffixes[0]}; {layout}')
    # An annotation file lists the images that count.
    if images - maps and not dataset.get('ann_file'):
        raise _Unusable(
            f'{len(images - maps)} of {len(images)} images have no label map, '
            f'first {min(images - maps)}{suffixes[0]}; {layout}'
        )
