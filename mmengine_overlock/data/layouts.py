"""Check a data set of a configuration, in COCO's layout or that of images and label maps, and apply the repairs."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS

from mmengine_overlock.config import as_list, nodes
from mmengine_overlock.data.cache import Files, Outcome, remember
from mmengine_overlock.data.coco import check_coco, check_evaluator, read_coco, require_images, write_coco
from mmengine_overlock.data.findings import REFUSED, REPAIRED, Finding, LayoutError, group
from mmengine_overlock.data.maps import check_maps, pair_maps

# With an output for each class; others, as RPN's, have outputs of their own.
HEADS = ('bbox_head', 'mask_head', 'decode_head', 'auxiliary_head')


def is_local(dataset: dict) -> bool:
    """Return whether a part of a configuration is a data set of one of the two layouts on local storage."""
    prefix = dataset.get('data_prefix') or {}
    coco = 'img' in prefix and str(dataset.get('ann_file')).endswith('.json')
    paths = (dataset.get('data_root'), dataset.get('ann_file'), *prefix.values())
    return (coco or 'seg_map_path' in prefix) and not any('://' in str(path) for path in paths)


def check_dataset(cfg: Config, dataset: dict, evaluators: Sequence[dict]) -> list[Finding]:
    """Check a data set that `is_local`; change its settings and those of its evaluators to what repairs it."""
    name, root = dataset['type'], Path(dataset.get('data_root') or '')
    kind = name if isinstance(name, type) else DATASETS.get(_in_scope(cfg, name))
    steps = [(node, node.get('type')) for node in nodes(dataset.get('pipeline'))]
    loaders = [node for node, step in steps if str(getattr(step, '__name__', step)).endswith('LoadImageFromFile')]
    found: dict[str, list[str]] = defaultdict(list)
    source = _Source(cfg, dataset, kind, root, _classes(dataset, kind, found), _rotates(loaders))
    try:
        if 'seg_map_path' in dataset['data_prefix']:
            outcome = _check_maps(source)
        else:
            outcome = _check_coco(source, evaluators)
    except LayoutError as error:
        return [
            Finding(
                'layout', REFUSED, f'{error}, below {dataset.get("data_root") or "."}, which --data-root DIR replaces'
            )
        ]
    if source.reads_as('CocoDataset', 'BaseSegDataset'):
        found['heads'] += _wrong_heads(source)
    old = (root / (dataset.get('ann_file') or '')).resolve()
    same = [node for node in evaluators if node.get('ann_file') and Path(node['ann_file']).resolve() == old]
    for node in (dataset, *same) if outcome.ann_file else ():
        node['ann_file'] = outcome.ann_file
    for node in loaders if outcome.ignore_orientation else ():
        node['color_type'] = f'{node.get("color_type", "color")}_ignore_orientation'
    if any(node.get('ignore_empty') for node in loaders) and not dataset.get('test_mode'):
        return group(found) + [finding.skipped() for finding in outcome.findings]
    return group(found) + outcome.findings


def _in_scope(cfg: Config, name: str) -> str:
    return name if '.' in name else f'{cfg.get("default_scope", "mmengine")}.{name}'


@dataclass
class _Source:
    """A data set, as its configuration describes it."""

    cfg: Config
    settings: dict
    kind: type | None
    root: Path
    classes: list[str] | None
    rotate: bool

    @property
    def work_dir(self) -> Path:
        return Path(self.cfg.get('work_dir') or '.')

    def reads_as(self, *names: str) -> bool:
        """Return whether its class reads files as its base class of one of these names does."""
        base = next((base for base in getattr(self.kind, '__mro__', ()) if base.__name__ in names), None)
        methods = ('load_data_list', 'parse_data_info')
        return base is not None and all(getattr(self.kind, method) is getattr(base, method) for method in methods)

    def option(self, name: str, fallback: Any) -> Any:
        """Return a setting, by default that of its class."""
        parameter = inspect.signature(self.kind).parameters.get(name) if self.kind else None
        return self.settings.get(name, getattr(parameter, 'default', fallback))


def _rotates(loaders: Sequence[dict]) -> bool:
    """Return whether mmcv loads images rotated by EXIF."""
    return not any(
        node.get('color_type') not in (None, 'color', 'grayscale') or node.get('imdecode_backend') == 'turbojpeg'
        for node in loaders
    )


def _classes(dataset: dict, kind: type | None, found: dict[str, list[str]]) -> list[str] | None:
    """Return the classes of a data set, or None where neither its settings nor its class name them."""
    classes = (dataset.get('metainfo') or {}).get('classes') or getattr(kind, 'METAINFO', {}).get('classes')
    if isinstance(classes, str) and Path(classes).is_file():
        return list_from_file(classes)
    if isinstance(classes, str):
        found['classes'].append(f'the string {classes!r} instead of a tuple of names, as ({classes!r},)')
        return [classes]
    given = list(classes or ())
    names = list(dict.fromkeys(given))
    found['classes'] += [f'the class {name} twice' for name in names if given.count(name) > 1]
    return names or None


def _wrong_heads(source: _Source) -> list[str]:
    """Return the heads of the model whose number of classes is not the data set's."""

    def heads(value: Any, name: str) -> Iterator[tuple[str, int]]:
        if isinstance(value, dict):
            # The auxiliary heads of STDC learn edges.
            if name in HEADS and 'num_classes' in value and value.get('type') != 'STDCHead':
                yield name, value['num_classes']
            for key, item in value.items():
                yield from heads(item, key)
        for item in value if isinstance(value, (list, tuple)) else ():
            yield from heads(item, name)

    expected = len(source.classes or ())
    given = dict.fromkeys(heads(source.cfg.get('model'), 'model'))
    return [
        f'{name} with num_classes={number} for {expected}' for name, number in given if expected and number != expected
    ]


def _check_coco(source: _Source, evaluators: Sequence[dict]) -> Outcome:
    settings = source.settings
    ann_file, folder = source.root / settings['ann_file'], source.root / settings['data_prefix']['img']
    layout = f"{settings['ann_file']} in COCO's format and its images in {settings['data_prefix']['img']}"
    labeled = not any(evaluator.get('format_only') for evaluator in evaluators)
    masks = any(node.get('with_mask') for node in nodes(settings.get('pipeline'))) or any(
        'segm' in as_list(evaluator.get('metric')) for evaluator in evaluators
    )
    standard = source.reads_as('CocoDataset')
    paths = [
        Path(node['ann_file'])
        for node in evaluators
        if str(node.get('type')).endswith('CocoMetric') and node.get('ann_file')
    ]
    # Of several evaluators, each may be for another data set.
    other = next(
        (path for path in paths if len(paths) == 1 and path.is_file() and path.resolve() != ann_file.resolve()), None
    )

    def check(files: list[Files], copy: Path) -> Outcome:
        content = read_coco(ann_file, source.classes, labeled)
        if not standard or not source.classes:
            require_images(content, ann_file, folder)
            return Outcome()
        found: dict[str, list[str]] = defaultdict(list)
        ignore = check_coco(content, folder, files[1], source.classes, masks, source.rotate, found)
        require_images(content, ann_file, folder)
        if other:
            check_evaluator(other, content, source.classes, found)
        findings = group(found)
        if not any(finding.outcome == REPAIRED and finding.kind != 'rotated' for finding in findings):
            return Outcome(findings, '', ignore)
        write_coco(copy, content)
        return Outcome(findings, str(copy.absolute()), ignore)

    with LayoutError.expecting(layout):
        for path in (ann_file, folder):
            if not path.exists():
                raise LayoutError(f'{path} does not exist')
        key = (standard, source.classes, labeled, masks, source.rotate)
        return remember(check, [ann_file, folder, *([other] if other else [])], key, source.work_dir)


def _check_maps(source: _Source) -> Outcome:
    prefix, reduce_zero = source.settings['data_prefix'], bool(source.option('reduce_zero_label', False))
    suffixes = str(source.option('img_suffix', '.jpg')), str(source.option('seg_map_suffix', '.png'))
    folders = source.root / prefix['img_path'], source.root / prefix['seg_map_path']
    listing = source.root / source.settings['ann_file'] if source.settings.get('ann_file') else None
    layout = (
        f'images {prefix["img_path"]}/*{suffixes[0]} and, by the same names, label maps '
        f'{prefix["seg_map_path"]}/*{suffixes[1]}'
    )
    # mmseg takes the values of maps for those of its class's own list of names.
    named = getattr(source.kind, 'METAINFO', {}).get('classes') or source.classes or ()
    classes = {value: name for value, name in enumerate(named, int(reduce_zero))}
    heads = [head for node in nodes(source.cfg.get('model')) for head in as_list(node.get('decode_head'))]
    ignored = {0, 255} if reduce_zero else {head.get('ignore_index', 255) for head in heads} or {255}

    def check(files: list[Files], copy: Path) -> Outcome:
        found: dict[str, list[str]] = defaultdict(list)
        pairs = pair_maps(folders, suffixes, files[0], files[1], listing, found)
        if not source.reads_as('BaseSegDataset'):
            return Outcome()
        found['classes'] += [name for name in source.classes or () if name not in named]
        ignore = check_maps(folders, pairs, classes, ignored, source.rotate, found)
        return Outcome(group(found), '', ignore)

    with LayoutError.expecting(layout):
        for folder in folders:
            if not folder.is_dir():
                raise LayoutError(f'{folder} does not exist')
        key = (source.kind, classes, source.classes, sorted(ignored), suffixes, source.rotate)
        return remember(check, [*folders, *([listing] if listing else [])], key, source.work_dir)
