"""Check a data set of a configuration, in COCO's layout or that of images and label maps, and apply the repairs."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from mmengine_overlock.config import as_list, nodes
from mmengine_overlock.data.cache import Files, Outcome, remember
from mmengine_overlock.data.classes import compare_classes, read_classes, set_classes, wrong_heads
from mmengine_overlock.data.coco import check_coco, check_evaluator, read_coco, require_images, write_coco
from mmengine_overlock.data.findings import REFUSED, REPAIRED, SHOWN, Finding, LayoutError, group
from mmengine_overlock.data.folders import listed
from mmengine_overlock.data.maps import check_maps, pair_maps


def is_local(dataset: dict) -> bool:
    """Return whether a part of a configuration is a data set of one of the two layouts on local storage."""
    prefix = dataset.get('data_prefix') or {}
    coco = 'img' in prefix and str(dataset.get('ann_file')).endswith('.json')
    paths = (dataset.get('data_root'), dataset.get('ann_file'), *prefix.values())
    return (coco or 'seg_map_path' in prefix) and not any('://' in str(path) for path in paths)


def dataset_class(cfg: Config, dataset: dict) -> type | None:
    """Return the class of a data set, or None where it is not registered."""
    name = dataset['type']
    if isinstance(name, type):
        return name
    return DATASETS.get(name if '.' in name else f'{cfg.get("default_scope", "mmengine")}.{name}')


def check_dataset(
    cfg: Config, dataset: dict, evaluators: Sequence[dict], trained: Sequence[str] | None = None
) -> Outcome:
    """Check a data set that `is_local`; change its settings and those of its evaluators to what repairs it.

    Args:
        cfg: The configuration that it is a part of.
        dataset: Its settings.
        evaluators: What evaluates it.
        trained: Classes of the data set of training.
    """
    found: dict[str, list[str]] = defaultdict(list)
    source = Source.of(cfg, dataset, found)
    root, kind, loaders = source.root, source.kind, source.loaders
    if source.reads_as('BaseSegDataset'):
        known = getattr(kind, 'METAINFO', {}).get('classes')
        strangers = [name for name in source.classes or () if known and name not in known]
        if not source.classes:
            order = 'in the order of the values in the label maps'
            found['metainfo'].append(f'no classes; set metainfo = dict(classes=(...)) {order}')
        elif strangers:
            lacking = f'classes that {getattr(kind, "__name__", kind)} does not have: {listed(strangers, most=SHOWN)}'
            found['metainfo'].append(f"{lacking}; set type='BaseSegDataset' for names of your own")
    # All else would follow from it.
    if any(found.values()):
        return Outcome(group(found))
    try:
        if 'seg_map_path' in dataset['data_prefix']:
            outcome = _check_maps(source)
        else:
            outcome = _check_coco(source, evaluators)
    except LayoutError as error:
        message = f'{error}, below {dataset.get("data_root") or "."}, which --data-root DIR replaces'
        return Outcome([Finding('layout', REFUSED, message)])
    if source.reads_as('CocoDataset', 'BaseSegDataset') and source.classes:
        compare_classes(source.classes, trained or source.classes, found)
        found['heads'] += wrong_heads(cfg.get('model'), len(source.classes), source.inherited)
    old = (root / (dataset.get('ann_file') or '')).resolve()
    same = [node for node in evaluators if node.get('ann_file') and Path(node['ann_file']).resolve() == old]
    for node in (dataset, *same) if outcome.ann_file else ():
        node['ann_file'] = outcome.ann_file
    for node in loaders if outcome.ignore_orientation else ():
        node['color_type'] = f'{node.get("color_type", "color")}_ignore_orientation'
    if any(node.get('ignore_empty') for node in loaders) and not dataset.get('test_mode'):
        outcome.findings = [finding.skipped() for finding in outcome.findings]
    outcome.findings = group(found) + outcome.findings
    return outcome


@dataclass
class Source:
    """A data set, as its configuration describes it."""

    cfg: Config
    settings: dict
    kind: type | None
    root: Path
    classes: list[str] | None
    loaders: list[dict]

    @classmethod
    def of(cls, cfg: Config, dataset: dict, found: dict[str, list[str]]) -> Source:
        """Read the settings of a data set; what is wrong with its classes goes to what was found."""
        kind = dataset_class(cfg, dataset)
        steps = [(node, node.get('type')) for node in nodes(dataset.get('pipeline'))]
        loaders = [node for node, step in steps if str(getattr(step, '__name__', step)).endswith('LoadImageFromFile')]
        root, classes = Path(dataset.get('data_root') or ''), read_classes(dataset, kind, found)
        return cls(cfg, dataset, kind, root, classes, loaders)

    @property
    def rotate(self) -> bool:
        """Whether mmcv loads images rotated by EXIF."""
        return not any(
            node.get('color_type') not in (None, 'color', 'grayscale') or node.get('imdecode_backend') == 'turbojpeg'
            for node in self.loaders
        )

    @property
    def map_folders(self) -> tuple[Path, Path]:
        """Of the images, and of their label maps."""
        prefix = self.settings['data_prefix']
        return self.root / prefix['img_path'], self.root / prefix['seg_map_path']

    @property
    def map_suffixes(self) -> tuple[str, str]:
        """Likewise."""
        return str(self.option('img_suffix', '.jpg')), str(self.option('seg_map_suffix', '.png'))

    @property
    def map_listing(self) -> Path | None:
        """File with the names of the images that count."""
        return self.root / self.settings['ann_file'] if self.settings.get('ann_file') else None

    @property
    def map_classes(self) -> dict[int, str]:
        """Classes by value in the label maps, which mmseg takes for those of its class's own list of names."""
        named = getattr(self.kind, 'METAINFO', {}).get('classes') or self.classes or ()
        return dict(enumerate(named, int(bool(self.option('reduce_zero_label', False)))))

    @property
    def work_dir(self) -> Path:
        return Path(self.cfg.get('work_dir') or '.')

    @property
    def inherited(self) -> str:
        """The class of a toolbox that the names of the classes come from, or '' where the user gave them."""
        toolbox = str(getattr(self.kind, '__module__', '')).startswith(('mmdet.', 'mmseg.'))
        given = (self.settings.get('metainfo') or {}).get('classes')
        return self.kind.__name__ if self.kind and toolbox and not given else ''

    def reads_as(self, *names: str) -> bool:
        """Return whether its class reads files as its base class of one of these names does."""
        base = next((base for base in getattr(self.kind, '__mro__', ()) if base.__name__ in names), None)
        methods = ('load_data_list', 'parse_data_info')
        return base is not None and all(getattr(self.kind, method) is getattr(base, method) for method in methods)

    def option(self, name: str, fallback: Any) -> Any:
        """Return a setting, by default that of its class."""
        parameter = inspect.signature(self.kind).parameters.get(name) if self.kind else None
        return self.settings.get(name, getattr(parameter, 'default', fallback))


def _check_coco(source: Source, evaluators: Sequence[dict]) -> Outcome:
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
    # Evaluators of several files may be for several data sets.
    other = next(
        (path for path in paths if len({*paths}) == 1 and path.is_file() and path.resolve() != ann_file.resolve()), None
    )

    def check(files: list[Files], copy: Path) -> Outcome:
        content = read_coco(ann_file, source.classes, labeled)
        if not standard or not source.classes:
            require_images(content, ann_file, folder)
            return Outcome()
        found: dict[str, list[str]] = defaultdict(list)
        ignore, statistics = check_coco(content, folder, files[1], source.classes, masks, source.rotate, found)
        require_images(content, ann_file, folder)
        if other:
            check_evaluator(other, content, source.classes, found)
        if source.inherited and found['unknown']:
            found.pop('misspelt', None)
            names = [category['name'] for category in content['categories'] if category['name'] not in found['absent']]
            theirs = f'the {len(source.classes)} classes are those of {source.inherited}'
            found['metainfo'].append(f'{theirs}, without {listed(found["unknown"], most=SHOWN)}; {set_classes(names)}')
        findings = group(found)
        if not any(finding.outcome == REPAIRED and finding.kind != 'rotated' for finding in findings):
            return Outcome(findings, '', ignore, statistics)
        write_coco(copy, content)
        return Outcome(findings, str(copy.absolute()), ignore, statistics)

    with LayoutError.expecting(layout):
        for path in (ann_file, folder):
            if not path.exists():
                raise LayoutError(f'{path} does not exist')
        key = (standard, source.classes, source.inherited, labeled, masks, source.rotate)
        return remember(check, [ann_file, folder, *([other] if other else [])], key, source.work_dir)


def _check_maps(source: Source) -> Outcome:
    prefix, folders, suffixes = source.settings['data_prefix'], source.map_folders, source.map_suffixes
    listing, classes = source.map_listing, source.map_classes
    layout = (
        f'images {prefix["img_path"]}/*{suffixes[0]} and, by the same names, label maps '
        f'{prefix["seg_map_path"]}/*{suffixes[1]}'
    )
    heads = [head for node in nodes(source.cfg.get('model')) for head in as_list(node.get('decode_head'))]
    ignored = {head.get('ignore_index', 255) for head in heads} or {255}
    ignored = {0, 255} if source.option('reduce_zero_label', False) else ignored

    def check(files: list[Files], copy: Path) -> Outcome:
        found: dict[str, list[str]] = defaultdict(list)
        pairs = pair_maps(folders, suffixes, files[0], files[1], listing, found)
        if not source.reads_as('BaseSegDataset'):
            return Outcome()
        ignore, statistics = check_maps(folders, pairs, classes, ignored, source.rotate, found)
        used = source.classes or ()
        statistics.classes = {name: count for name, count in statistics.classes.items() if name in used}
        return Outcome(group(found), '', ignore, statistics)

    with LayoutError.expecting(layout):
        for folder in folders:
            if not folder.is_dir():
                raise LayoutError(f'{folder} does not exist')
        key = (source.kind, classes, source.classes, sorted(ignored), suffixes, source.rotate)
        return remember(check, [*folders, *([listing] if listing else [])], key, source.work_dir)
