"""Checks of the data sets before a run, so that a wrong path is one sentence instead of a traceback."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS

from mmengine_overlock.config import as_list
from overlock.utils.errors import UserError


def check_data(cfg: Config, *splits: str) -> None:
    """Check that the data sets and evaluators of a run find their files and that these are not empty.

    Data sets of COCO's and ADE20K's layouts are checked, any other is left to its own class.

    Args:
        cfg: Configuration of the run.
        splits: Which of 'train', 'val' and 'test' the run uses.

    Raises:
        UserError: Files are missing, empty or of another format; the message tells the expected layout.
    """
    checked: list = []
    for split in splits:
        evaluators = as_list(cfg.get(f'{split}_evaluator'))
        for dataset in _leaves((cfg.get(f'{split}_dataloader') or {}).get('dataset')):
            if dataset in checked:
                continue
            checked.append(dataset)
            prefix = dataset.get('data_prefix') or {}
            if 'seg_map_path' in prefix:
                _check_maps(dataset, split, _dataset_class(cfg, dataset))
            elif 'img' in prefix and str(dataset.get('ann_file')).endswith('.json'):
                labelled = not any(evaluator.get('format_only') for evaluator in evaluators)
                _check_coco(dataset, split, _dataset_class(cfg, dataset), labelled)
        for evaluator in evaluators:
            path = evaluator.get('ann_file')
            if path and _is_local(path) and not Path(path).is_file():
                raise UserError(
                    f'The annotation file {path} of {split}_evaluator does not exist; give the folder of '
                    'the data with --data-root DIR.'
                )


def _leaves(dataset: dict | None) -> Iterator[dict]:
    """The data sets inside RepeatDataset, ConcatDataset and other wrappers."""
    inner = (dataset or {}).get('dataset', (dataset or {}).get('datasets'))
    if inner is not None:
        for item in as_list(inner):
            yield from _leaves(item)
    elif dataset:
        yield dataset


def _dataset_class(cfg: Config, dataset: dict) -> type | None:
    scope = cfg.get('default_scope', 'mmengine')
    return DATASETS.get(dataset['type'] if '.' in dataset['type'] else f'{scope}.{dataset["type"]}')


def _is_local(path: str) -> bool:
    return '://' not in path


def _paths(dataset: dict, *names: str) -> list[Path] | None:
    """Paths below `data_root`, as mmengine's BaseDataset joins them; None for remote storage."""
    root = dataset.get('data_root') or ''
    if not all(_is_local(name) for name in (root, *names)):
        return None
    return [Path(root) / name for name in names]


def _layout(dataset: dict, expected: str) -> str:
    root = dataset.get('data_root')
    return f'expected {expected}' + (f', below {root}, which --data-root DIR replaces' if root else '')


def _check_coco(dataset: dict, split: str, kind: type | None, labelled: bool) -> None:
    images = dataset['data_prefix']['img']
    paths = _paths(dataset, dataset['ann_file'], images)
    if paths is None:
        return
    ann_file, folder = paths
    layout = _layout(dataset, f"{dataset['ann_file']} in COCO's format and its images in {images}")

    def fail(reason: str) -> None:
        raise UserError(f'The {split} data set cannot be used: {reason}; {layout}.')

    if not ann_file.is_file():
        fail(f'{ann_file} does not exist')
    try:
        content = json.loads(ann_file.read_bytes())
    except ValueError as error:
        fail(f'{ann_file} is {"empty" if not ann_file.stat().st_size else f"not JSON ({error})"}')
    if not isinstance(content, dict):
        fail(f"{ann_file} holds a JSON {type(content).__name__}, not the dict of COCO's format")
    for key in ('images', 'categories', *(['annotations'] if labelled else [])):
        if not content.get(key):
            fail(f'{ann_file} has no {key}')
    if not folder.is_dir():
        fail(f'{folder} does not exist')
    first = content['images'][0].get('file_name')
    if first and not (folder / first).is_file():
        fail(f'{first}, the first image of {ann_file.name}, is not in {folder}')
    _check_classes(dataset, split, kind, ann_file, [category.get('name') for category in content['categories']])


def _check_classes(dataset: dict, split: str, kind: type | None, ann_file: Path, names: list) -> None:
    """mmdet drops categories that it does not know, all of them if need be."""
    classes = (dataset.get('metainfo') or {}).get('classes') or getattr(kind, 'METAINFO', {}).get('classes')
    if isinstance(classes, (list, tuple)) and not set(classes) & set(names):
        raise UserError(
            f'The {split} data set cannot be used: no category of {ann_file} ({_some(names)}) is one of its classes '
            f'({_some(classes)}); set `metainfo = dict(classes=(...))` in the data set to the names in the file.'
        )


def _some(names: list | tuple) -> str:
    return ', '.join(map(str, names[:3])) + (', ...' if len(names) > 3 else '')


def _check_maps(dataset: dict, split: str, kind: type | None) -> None:
    prefix = dataset['data_prefix']
    paths = _paths(dataset, prefix['img_path'], prefix['seg_map_path'])
    if paths is None:
        return
    defaults = inspect.signature(kind).parameters if kind else {}
    suffixes = [
        dataset.get(name) or getattr(defaults.get(name), 'default', fallback)
        for name, fallback in (('img_suffix', '.jpg'), ('seg_map_suffix', '.png'))
    ]
    layout = _layout(
        dataset,
        f'images {prefix["img_path"]}/*{suffixes[0]} and, by the same names, label maps '
        f'{prefix["seg_map_path"]}/*{suffixes[1]}',
    )
    found = []
    for path, suffix in zip(paths, suffixes, strict=True):
        if not path.is_dir():
            raise UserError(f'The {split} data set cannot be used: {path} does not exist; {layout}.')
        found.append({str(file.relative_to(path)).removesuffix(suffix) for file in path.rglob(f'*{suffix}')})
    images, maps = found
    if not images:
        raise UserError(f'The {split} data set cannot be used: {paths[0]} has no images *{suffixes[0]}; {layout}.')
    if dataset.get('ann_file'):
        return
    if images - maps:
        raise UserError(
            f'The {split} data set cannot be used: {len(images - maps)} of {len(images)} images have no '
            f'label map, first {min(images - maps)}{suffixes[0]}; {layout}.'
        )
