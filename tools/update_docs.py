#!/usr/bin/env python
"""Write the generated parts of documents: tables of weights, model-index.yml and figures of the architecture."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx
import torch
import yaml
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
# A plain clone works too, without `pip install -e .` and from any folder.
sys.path.insert(0, str(ROOT))

from overlock import ARCHS, MogaNet, OverLoCK, OverLoCKBackbone
from overlock.checkpoint import WEIGHTS, Weights

_RESULTS = {
    'classification': ('Image Classification', 'ImageNet-1K', {'top1': 'Top 1 Accuracy'}),
    'detection': ('Instance Segmentation', 'COCO', {'box_ap': 'box AP', 'mask_ap': 'mask AP'}),
    'segmentation': ('Semantic Segmentation', 'ADE20K', {'miou': 'mIoU (single scale)'}),
}

# The ways of the image through the backbone.
_WAYS = (
    ('image', 'base_net.stem', 'base_net.stage1', 'base_net.stage2', 'output_norms.out1', 'base_net.stage3'),
    ('base_net.stage3', 'overview_net.stage', 'focus_net.context_proj', 'focus_net.stage3', 'focus_net.stage4'),
    ('base_net.stage1', 'output 0'),
    ('output_norms.out1', 'output 1'),
    ('base_net.stage3', 'focus_net.stage3', 'output 2'),
    ('focus_net.context_proj', 'focus_net.stage4', 'output 3'),
    ('overview_net.stage', 'overview_proj', 'output 3'),
)


@cache
def parameters(arch: str, form: str = 'training', network: str = 'OverLoCK') -> int:
    """Return the number of parameters of a classifier in one of the published forms, all heads included."""
    with torch.device('meta'):
        model = (OverLoCK(arch) if network == 'OverLoCK' else MogaNet(arch)).to_form(form)
    return sum(parameter.numel() for parameter in model.parameters())


def model_index() -> dict[str, Any]:
    """Return the published weights in the form of OpenMMLab's model-index.yml; results are paper-reported."""
    overlock = dict(
        Name='OverLoCK',
        README='README.md',
        Metadata=dict(Architecture=['Base-Net', 'Overview-Net', 'Focus-Net', 'ContMix']),
        Paper=dict(
            URL='https://arxiv.org/abs/2502.20087',
            Title='OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels',
        ),
    )
    moganet = dict(
        Name='MogaNet',
        README='README.md',
        Metadata=dict(Architecture=['Multi-Order Gated Aggregation', 'Channel Aggregation']),
        Paper=dict(URL='https://arxiv.org/abs/2211.03295', Title='MogaNet: Multi-order Gated Aggregation Network'),
    )
    return dict(Collections=[overlock, moganet], Models=[_entry(name, weights) for name, weights in WEIGHTS.items()])


def _entry(name: str, weights: Weights) -> dict[str, Any]:
    task, dataset, metrics = _RESULTS[weights.task]
    entry: dict[str, Any] = {'Name': name, 'In Collection': weights.network}
    if weights.task == 'classification':
        count = parameters(weights.arch, weights.form, weights.network)
        entry['Metadata'] = dict(Parameters=count, Form=weights.form)
    else:
        entry['Config'] = f'configs/{weights.config}.py'
    # RetinaNet has no masks.
    task = 'Object Detection' if [*weights.metrics] == ['box_ap'] else task
    figures = {metrics[key]: value for key, value in weights.metrics.items()}
    entry['Results'] = [dict(Task=task, Dataset=dataset, Source='paper', Metrics=figures)]
    entry['Weights'] = weights.url
    return entry


def parts() -> dict[str, str]:
    """Return the generated parts of documents by the names in their comments."""
    return {
        'table: classification': classification_table(),
        'table: dense': dense_table('OverLoCK'),
        'table: moganet': moganet_table(),
        'table: moganet_dense': dense_table('MogaNet'),
        'figure: packages': package_figure(),
        'figure: network': network_figure(),
    }


def classification_table() -> str:
    lines = ['| weights | parameters | top-1 at 224x224 | crop |', '| --- | --- | --- | --- |']
    for arch in ARCHS:
        name = f'overlock_{arch}_in1k'
        top1, crop = WEIGHTS[name].metrics['top1'], WEIGHTS[name].crop_pct
        links = f'{_link(name)}, {_link(f"{name}_reparam")}'
        lines.append(f'| {links} | {parameters(arch) / 1e6:.2f} M | {top1:.1f} | {crop} |')
    return '\n'.join([*lines, ''])


def moganet_table() -> str:
    lines = ['| weights | parameters | image | top-1 | crop |', '| --- | --- | --- | --- | --- |']
    for name, weights in WEIGHTS.items():
        if weights.network == 'MogaNet' and weights.task == 'classification':
            count = f'{parameters(weights.arch, network="MogaNet") / 1e6:.2f} M'
            top1, size = weights.metrics['top1'], f'{weights.size}x{weights.size}'
            lines.append(f'| {_link(name)} | {count} | {size} | {top1:.1f} | {weights.crop_pct} |')
    return '\n'.join([*lines, ''])


def dense_table(network: str) -> str:
    lines = ['| weights | configuration | result |', '| --- | --- | --- |']
    for name, weights in WEIGHTS.items():
        if weights.config and weights.network == network:
            metrics = _RESULTS[weights.task][2]
            results = ', '.join(f'{metrics[key]} {value:.1f}' for key, value in weights.metrics.items())
            lines.append(f'| {_link(name)} | [{weights.config}.py](configs/{weights.config}.py) | {results} |')
    return '\n'.join([*lines, ''])


def _link(name: str) -> str:
    return f'[`{name}`]({WEIGHTS[name].url})'


def package_figure() -> str:
    """Return a Mermaid graph of which package imports which, without the arrows that follow from others."""
    parts = sorted(f'overlock.{path.parent.name}' for path in ROOT.glob('overlock/*/__init__.py'))
    packages = [*parts, *sorted(path.parent.name for path in ROOT.glob('*_overlock/__init__.py')), 'demo', 'tools']
    graph = networkx.DiGraph()
    graph.add_nodes_from(packages)
    for package in packages:
        files = (ROOT / package.replace('.', '/')).rglob('*.py')
        names = {name for file in files for name in _imported(file)}
        imported = {other for name in names for other in packages if f'{name}.'.startswith(f'{other}.')}
        graph.add_edges_from((package, other) for other in imported - {package})
    labels = {package: package.replace('.', '/') for package in packages}
    return _flowchart(labels, sorted(networkx.transitive_reduction(graph).edges))


def _flowchart(labels: Mapping[str, str], arrows: Iterable[tuple[str, str]]) -> str:
    ids = {name: re.sub(r'\W', '_', name) for name in labels}
    lines = [f'    {ids[name]}["{label}"]' for name, label in labels.items()]
    lines += [f'    {ids[start]} --> {ids[end]}' for start, end in arrows]
    return '\n'.join(['```mermaid', 'flowchart TD', *lines, '```', ''])


def network_figure(size: int = 512) -> str:
    """Return a Mermaid graph of an image's way through the backbone of XT, with the shapes that a run gives."""
    arrows = list(dict.fromkeys(arrow for way in _WAYS for arrow in pairwise(way)))
    shapes = {name: '' for arrow in arrows for name in arrow} | {'image': f'3x{size}x{size}'}

    def note(name: str, out: Tensor | tuple[Tensor, ...]) -> None:
        maps = (out,) if isinstance(out, Tensor) else out
        shapes[name] = ' + '.join('x'.join(map(str, x.shape[1:])) for x in maps)

    with torch.device('meta'):
        backbone = OverLoCKBackbone('xt').eval()
        for name, module in backbone.named_modules():
            if name in shapes:
                # Nobody calls a list of blocks: its last block stands for it.
                last = module[-1] if isinstance(module, nn.ModuleList) else module
                last.register_forward_hook(lambda _, args, out, name=name: note(name, out))
        for index, out in enumerate(backbone(torch.zeros(1, 3, size, size))):
            note(f'output {index}', out)
    return _flowchart({name: f'{name}<br>{shape}' for name, shape in shapes.items()}, arrows)


def _imported(file: Path) -> Iterator[str]:
    """Yield the names that a file imports, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def fill_in(document: str, parts: Mapping[str, str]) -> str:
    """Put parts into their places in a Markdown document, between the comments `<!-- NAME -->` and `<!-- end -->`."""
    place = re.compile(r'(<!-- (\w+: \w+) -->\n).*?(?=<!-- end -->)', re.DOTALL)
    return place.sub(lambda match: match[1] + parts[match[2]], document)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing; the exit code is 1 if something is stale')
    check = parser.parse_args().check
    generated = parts()
    documents = [ROOT / 'README.md', ROOT / 'docs/architecture.md', ROOT / 'docs/moganet.md']
    contents = {path: fill_in(path.read_text(encoding='utf-8'), generated) for path in documents}
    contents[ROOT / 'model-index.yml'] = yaml.safe_dump(model_index(), sort_keys=False, allow_unicode=True, width=120)
    absent = [name for name in generated if not any(f'<!-- {name} -->' in text for text in contents.values())]
    assert not absent, f'no document has a place for {absent}'
    stale = [path for path, content in contents.items() if path.read_text(encoding='utf-8') != content]
    for path in stale:
        print(f'{path.relative_to(ROOT)} {"is stale" if check else "written"}')
        if not check:
            path.write_text(contents[path], encoding='utf-8')
    return bool(stale and check)


if __name__ == '__main__':
    sys.exit(main())
