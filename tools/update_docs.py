#!/usr/bin/env python
"""Write the generated parts of documents: tables of weights and measurements, model-index.yml and figures."""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
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

from benchmarks import links, loading
from mmengine_overlock.complexity import Complexity, count, count_config
from overlock import ARCHS, MogaNet, OverLoCK, OverLoCKBackbone
from overlock.checkpoint import WEIGHTS, Weights
from overlock.utils.configs import config_names, model_of

_RESULTS = {
    'classification': ('Image Classification', 'ImageNet-1K', {'top1': 'Top 1 Accuracy'}),
    'detection': ('Instance Segmentation', 'COCO', {'box_ap': 'box AP', 'mask_ap': 'mask AP'}),
    'segmentation': ('Semantic Segmentation', 'ADE20K', {'miou': 'mIoU (single scale)'}),
}

_NETWORKS: dict[str, Callable[..., OverLoCK | MogaNet]] = {
    'OverLoCK': partial(OverLoCK, aux_head=False),
    'MogaNet': MogaNet,
}
COMPLEXITY = ROOT / 'docs/complexity.json'
# Paper-reported: parameters in M, multiply-adds at 224x224 in G.
_PAPER = {'xt': (16, 2.6), 't': (33, 5.5), 's': (56, 9.7), 'b': (95, 16.7)}
# The same of MogaNet, by variant and size of the image.
_PAPER_MOGANET = {
    ('xt', 224): (2.97, 0.80),
    ('xt', 256): (2.97, 1.04),
    ('t', 224): (5.20, 1.10),
    ('t', 256): (5.20, 1.44),
    ('s', 224): (25.3, 4.97),
    ('b', 224): (43.9, 9.93),
    ('l', 224): (82.5, 15.9),
    ('xl', 224): (180.8, 34.5),
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


@cache
def complexity() -> dict[str, dict[str, Any]]:
    """Return the costs of the models by name: those in docs/complexity.json, and others counted now."""
    recorded = json.loads(COMPLEXITY.read_text(encoding='utf-8')) if COMPLEXITY.is_file() else {}
    counts = {model_name(weights): partial(count_weights, weights) for weights in WEIGHTS.values()}
    counts |= {model_of(name): partial(count_file, path) for name, path in config_names().items()}
    return {model: recorded.get(model) or count() for model, count in counts.items()}


def model_name(weights: Weights) -> str:
    """Return a name of the model that a file is for."""
    if weights.config:
        return model_of(weights.config)
    return f'{weights.network}-{weights.arch.upper()}, {weights.form} form, {weights.size}x{weights.size}'


def count_weights(weights: Weights) -> dict[str, Any]:
    """Count a detector or segmenter with folded backbone, or a classifier in the form of its file, one head."""
    if weights.config:
        return count_file(ROOT / f'configs/{weights.config}.py')
    network = _NETWORKS[weights.network](weights.arch).to_form(weights.form)
    return _as_dict(count(network, torch.zeros(1, 3, weights.size, weights.size)))


def count_file(path: Path) -> dict[str, Any]:
    """Count the detector or segmenter of a configuration, with folded backbone."""
    return _as_dict(count_config(path))


def _as_dict(counted: Complexity) -> dict[str, Any]:
    return dict(
        size=list(counted.size),
        parameters=counted.parameters[''],
        multiply_adds=counted.multiply_adds[''],
        operators=counted.operators,
    )


def _costs(weights: Weights) -> str:
    counted = complexity()[model_name(weights)]
    return f'{counted["parameters"] / 1e6:.2f} M | {counted["multiply_adds"] / 1e9:.2f} G'


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
    counted = complexity()[model_name(weights)]
    metadata: dict[str, Any] = dict(Parameters=counted['parameters'], FLOPs=counted['multiply_adds'])
    if weights.task == 'classification':
        # The file has all heads.
        metadata['Parameters'] = parameters(weights.arch, weights.form, weights.network)
        metadata['Form'] = weights.form
    else:
        entry['Config'] = f'configs/{weights.config}.py'
    entry['Metadata'] = metadata
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
        'table: dense': dense_table('OverLoCK', 'configs'),
        'table: paper': paper_table(),
        'table: moganet': moganet_table(),
        'table: moganet_dense': dense_table('MogaNet', '../configs'),
        'figure: packages': package_figure(),
        'figure: network': network_figure(),
        **links.tables(),
        **loading.tables(),
    }


def classification_table() -> str:
    lines = ['| weights | parameters | multiply-adds | paper | top-1 | crop |', '| --- | --- | --- | --- | --- | --- |']
    for arch in ARCHS:
        name = f'overlock_{arch}_in1k'
        top1, crop = WEIGHTS[name].metrics['top1'], WEIGHTS[name].crop_pct
        links = f'{_link(name)}, {_link(f"{name}_reparam")}'
        costs, paper = _costs(WEIGHTS[f'{name}_reparam']), '{} M, {} G'.format(*_PAPER[arch])
        lines.append(f'| {links} | {costs} | {paper} | {top1:.1f} | {crop} |')
    return '\n'.join([*lines, ''])


def moganet_table() -> str:
    lines = ['| weights | parameters | multiply-adds | paper | image | top-1 | crop |', f'|{" --- |" * 7}']
    for name, weights in WEIGHTS.items():
        if weights.network == 'MogaNet' and weights.task == 'classification':
            paper = '{:g} M, {:.2f} G'.format(*_PAPER_MOGANET[weights.arch, weights.size])
            top1, size = weights.metrics['top1'], f'{weights.size}x{weights.size}'
            lines.append(f'| {_link(name)} | {_costs(weights)} | {paper} | {size} | {top1:.1f} | {weights.crop_pct} |')
    return '\n'.join([*lines, ''])


def dense_table(network: str, folder: str) -> str:
    """Return the detectors and segmenters with a backbone; `folder` leads from the document to the configurations."""
    lines = ['| weights | configuration | parameters | multiply-adds | result |', f'|{" --- |" * 5}']
    for name, weights in WEIGHTS.items():
        if weights.config and weights.network == network:
            metrics = _RESULTS[weights.task][2]
            results = ', '.join(f'{metrics[key]} {value:.1f}' for key, value in weights.metrics.items())
            config = f'[{weights.config}.py]({folder}/{weights.config}.py)'
            lines.append(f'| {_link(name)} | {config} | {_costs(weights)} | {results} |')
    return '\n'.join([*lines, ''])


def paper_table() -> str:
    """Return how the multiply-adds of the paper come out, see docs/complexity.md: from the count here, step by step."""
    rows: dict[str, list[float]] = {}
    for name, arch in ARCHS.items():
        counted = complexity()[model_name(WEIGHTS[f'overlock_{name}_in1k_reparam'])]
        operators = counted['operators']
        contmix = operators['contmix'] + operators['matmul']
        kept = operators['conv'] + operators['batch_norm']
        *base_sides, side3, side4 = (224 // stride for stride in (4, 8, 16, 32, 16, 32))
        static = zip((*arch.base_depths, arch.overview_depth), base_sides, arch.embed_dims, strict=True)
        hidden = [(depth, side, dims * arch.static_mlp_ratio) for depth, side, dims in static]
        projection = 0
        dynamic = zip(
            arch.focus_depths,
            (side3, side4),
            arch.embed_dims[2:],
            arch.focus_groups,
            arch.dynamic_kernel_sizes,
            strict=True,
        )
        for depth, side, dims, groups, size in dynamic:
            hidden.append((depth, side, dims * arch.dynamic_mlp_ratio))
            projection += depth * side**2 * groups * 49 * (arch.small_kernel_size**2 + size**2)
        depthwise = sum(depth * side**2 * width * 9 for depth, side, width in hidden)
        for label, value in {
            'counted here, merged form': counted['multiply_adds'],
            'ContMix as here': -contmix,
            'projection of affinities at each pixel': projection,
            'LayerNorm, interpolation, pooling': kept + contmix - counted['multiply_adds'],
            'depthwise convolutions of the feed-forwards': -depthwise,
            'sum': kept + projection - depthwise,
            'paper-reported': _PAPER[name][1] * 1e9,
        }.items():
            rows.setdefault(label, []).append(value / 1e9)
    lines = [f'| G at 224x224 | {" | ".join(name.upper() for name in ARCHS)} |', f'| --- |{" --- |" * len(ARCHS)}']
    for label, values in rows.items():
        cells = (f'{value:.1f}' if label == 'paper-reported' else f'{value:.3f}' for value in values)
        lines.append(f'| {label} | {" | ".join(cells)} |')
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
    names = ('README.md', *(f'docs/{name}.md' for name in ('architecture', 'complexity', 'moganet', 'scaling')))
    documents = [ROOT / name for name in names]
    contents = {path: fill_in(path.read_text(encoding='utf-8'), generated) for path in documents}
    contents[COMPLEXITY] = json.dumps(complexity(), indent=1) + '\n'
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
