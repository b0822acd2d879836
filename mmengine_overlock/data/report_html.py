"""Write a report with pictures as one HTML file without scripts or other files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape
from itertools import islice

import cv2

from mmengine_overlock.config import nodes
from mmengine_overlock.data.files import scan
from mmengine_overlock.data.findings import REFUSED, LayoutError
from mmengine_overlock.data.layouts import Source
from mmengine_overlock.data.maps import pair_maps
from mmengine_overlock.data.pictures import Color, Drawn, colors_of, draw_boxes, draw_maps
from mmengine_overlock.data.report import Report

# Of each split; and classes below a picture, items below a finding.
PICTURES, NAMES, ITEMS = 12, 8, 100
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; overflow-wrap: anywhere } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: 2px 14px 2px 0; text-align: right; font-weight: normal }
td:first-child, th:first-child { text-align: left; white-space: pre } th { color: #666; border-bottom: 1px solid #ccc }
.bar { text-align: left; width: 360px; padding-right: 0 } td.bar div { height: 7px; margin: 1px 0 }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 16px }
figure { margin: 0 }
svg, img { width: 100%; max-height: 280px; object-fit: contain; display: block; background: #f4f4f4 }
svg text { fill: #fff; stroke: #000; paint-order: stroke; font-family: system-ui, sans-serif }
figcaption { font-size: 12px; color: #666; overflow-wrap: anywhere }
i { display: inline-block; width: 10px; height: 10px }
.refused { color: #b00020 } .repaired { color: #8a5a00 } .told { color: #555 } li { font-size: 13px }
"""
# Of the bars, by split.
_BARS = ('#3b6ea8', '#e0a03c', '#8aa84a')


def html(report: Report) -> str:
    """Return a report as HTML: the tables, a bar for each class and split, the findings, and labeled images."""
    verdict = f'<p class="{"told" if report.usable else "refused"}">{report.verdict}</p>'
    parts = [f'<h1>{escape(report.source)}</h1>', verdict, _table(report.overview())]
    parts += [f'<p>{escape(remark)}</p>' for remark in report.remarks]
    parts += ['<h2>Classes</h2>', _table(report.by_class(), _bars(report))]
    parts += ['<h2>Findings</h2>', *_findings(report)]
    for split in report.outcomes:
        figures = ''.join(islice(_figures(report, split), PICTURES))
        parts.append(f'<h2>Images of {split}</h2><div class="figures">{figures}</div>' if figures else '')
    head = f'<meta charset="utf-8"><title>{escape(report.source)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _table(rows: Sequence[Sequence[str]], bars: Sequence[str] = ()) -> str:
    cells = [[escape(cell) for cell in row] for row in rows]
    lines = []
    for place, row in enumerate(cells):
        kind = 'td' if place else 'th'
        bar = f'<{kind} class="bar">{bars[place]}</{kind}>' if bars else ''
        lines.append(f'<tr>{"".join(f"<{kind}>{cell}</{kind}>" for cell in row)}{bar}</tr>')
    return f'<table>{"".join(lines)}</table>'


def _bars(report: Report) -> list[str]:
    """Return the key of the bars, and those of each class: its share of the boxes or pixels of each split."""
    statistics = [outcome.statistics for outcome in report.outcomes.values()]
    what = 'boxes' if any(each.total('boxes') for each in statistics) else 'pixels'
    shares = [
        [each.classes.get(name, {}).get(what, 0) / max(each.total(what), 1) for each in statistics]
        for name in report.labeled
    ]
    largest = max((share for row in shares for share in row), default=0) or 1
    keys = [f'<i style="background:{color}"></i> {split}' for split, color in zip(report.outcomes, _BARS, strict=False)]
    bars = [
        ''.join(
            f'<div title="{split}: {share:.1%}" style="width:{share / largest:.1%};background:{color}"></div>'
            for split, share, color in zip(report.outcomes, row, _BARS, strict=False)
        )
        for row in shares
    ]
    return [f'shares of {what}: {", ".join(keys)}', *bars]


def _findings(report: Report) -> Iterator[str]:
    for split, outcome in report.outcomes.items():
        for record in outcome.findings:
            items = ''.join(f'<li>{escape(item)}</li>' for item in record.items[:ITEMS])
            more = f'<li>and {len(record.items) - ITEMS:,} more</li>' if len(record.items) > ITEMS else ''
            title = f'{split}, <span class="{record.outcome}">{record.outcome}</span>: {escape(record.brief())}'
            state = ' open' * (record.outcome == REFUSED)
            items = f'<ul>{items}{more}</ul>' if items else ''
            yield f'<details{state}><summary>{title}</summary>{items}</details>'
    if not any(outcome.findings for outcome in report.outcomes.values()):
        yield '<p>Nothing to tell.</p>'


def _figures(report: Report, split: str) -> Iterator[str]:
    for dataset in report.datasets(split):
        source = Source.of(report.cfg, dataset, defaultdict(list))
        known = getattr(source.kind, 'METAINFO', {}) | (dataset.get('metainfo') or {})
        maps = 'seg_map_path' in dataset['data_prefix']
        classes = list(source.map_classes.values()) if maps else source.classes or []
        colors = colors_of(len(classes), known.get('palette'))
        pictures = _map_pictures(source, colors) if maps else _box_pictures(source, classes, colors)
        for picture in pictures:
            legend = dict(zip(classes, colors, strict=True)) if maps else {}
            names = [
                (f'<i style="background:rgb{legend[name]}"></i> ' if legend else '') + escape(name)
                for name in picture.classes[:NAMES]
            ]
            more = ', ...' * (len(picture.classes) > NAMES)
            caption = f'<figcaption>{escape(picture.name)}: {", ".join(names)}{more}</figcaption>'
            yield f'<figure>{picture.markup}{caption}</figure>'


def _flags(source: Source) -> int:
    return cv2.IMREAD_COLOR if source.rotate else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION


def _box_pictures(source: Source, classes: Sequence[str], colors: Sequence[Color]) -> Iterator[Drawn]:
    settings = source.settings
    ann_file, folder = source.root / settings['ann_file'], source.root / settings['data_prefix']['img']
    masks = any(node.get('with_mask') for node in nodes(settings.get('pipeline')))
    try:
        yield from draw_boxes(ann_file, folder, classes, colors, _flags(source), masks, PICTURES)
    # A file that the check has refused.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return


def _map_pictures(source: Source, colors: Sequence[Color]) -> Iterator[Drawn]:
    folders = source.map_folders
    try:
        images, maps = (scan(folder) for folder in folders)
        pairs = pair_maps(folders, source.map_suffixes, images, maps, source.map_listing, defaultdict(list))
    except LayoutError:
        return
    yield from draw_maps(folders, pairs, source.map_classes, colors, _flags(source), PICTURES)
