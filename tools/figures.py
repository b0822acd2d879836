"""Draw the figures of docs/architecture.md as Mermaid graphs, from imports and from a run of the network."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx
import torch
from torch import Tensor, nn

from overlock import OverLoCKBackbone

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    'overlock.models',
    'overlock.layers',
    'overlock.ops',
    'overlock.checkpoint',
    'overlock.utils',
    'overlock.timm',
    'mmengine_overlock',
    'mmdet_overlock',
    'mmseg_overlock',
    'imagenet_overlock',
    'demo',
    'tools',
)
# The way of the image, by modules of the backbone, its input and its outputs.
FLOW = (
    ('image', 'base_net.stem'),
    ('base_net.stem', 'base_net.stage1'),
    ('base_net.stage1', 'output 0'),
    ('base_net.stage1', 'base_net.stage2'),
    ('base_net.stage2', 'output_norms.out1'),
    ('output_norms.out1', 'output 1'),
    ('output_norms.out1', 'base_net.stage3'),
    ('base_net.stage3', 'overview_net.stage'),
    ('base_net.stage3', 'focus_net.stage3'),
    ('overview_net.stage', 'focus_net.context_proj'),
    ('focus_net.context_proj', 'focus_net.stage3'),
    ('focus_net.context_proj', 'focus_net.stage4'),
    ('focus_net.stage3', 'output 2'),
    ('focus_net.stage3', 'focus_net.stage4'),
    ('overview_net.stage', 'overview_proj'),
    ('focus_net.stage4', 'output 3'),
    ('overview_proj', 'output 3'),
)


def package_figure() -> str:
    """Return the graph of which package imports which, without the arrows that follow from others."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(PACKAGES)
    for package in PACKAGES:
        graph.add_edges_from((package, other) for other in _imports(package) if other != package)
    reduced = networkx.transitive_reduction(graph)
    lines = [f'    {_identifier(name)}["{name.replace(".", "/")}"]' for name in PACKAGES]
    lines += [
        f'    {_identifier(a)} --> {_identifier(b)}' for a in PACKAGES for b in PACKAGES if reduced.has_edge(a, b)
    ]
    return _mermaid('flowchart TD', lines)


def _imports(package: str) -> set[str]:
    path = ROOT / package.replace('.', '/')
    files = path.rglob('*.py') if path.is_dir() else [path.with_suffix('.py')]
    names = {name for file in files for name in _imported(file)}
    # `from overlock import OverLoCK` takes what the package itself imports from below.
    exported = {f'overlock.{name.rpartition(".")[2]}': name for name in _imported(ROOT / 'overlock/__init__.py')}
    names = {exported.get(name, name) for name in names}
    return {other for name in names for other in PACKAGES if f'{name}.'.startswith(f'{other}.')}


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def network_figure(arch: str = 'xt', size: int = 512) -> str:
    """Return the graph of an image's way through the backbone, with the shapes that a run gives."""
    shapes = {'image': f'3x{size}x{size}'}
    with torch.device('meta'):
        backbone = OverLoCKBackbone(arch).eval()
        names = {name for edge in FLOW for name in edge if hasattr(backbone, name.partition('.')[0])}
        for name in names:
            # Nobody calls a stage as a whole: its last block stands for it.
            module = backbone.get_submodule(name)
            module = module[-1] if isinstance(module, (nn.ModuleList, nn.Sequential)) else module
            module.register_forward_hook(lambda _, args, out, name=name: shapes.__setitem__(name, _shape(out)))
        for index, out in enumerate(backbone(torch.zeros(1, 3, size, size))):
            shapes[f'output {index}'] = _shape(out)
    lines = [f'    {_identifier(name)}["{name}<br>{shapes[name]}"]' for name in dict.fromkeys(sum(FLOW, ()))]
    lines += [f'    {_identifier(a)} --> {_identifier(b)}' for a, b in FLOW]
    return _mermaid('flowchart TD', lines)


def _shape(out: Tensor | tuple[Tensor, ...]) -> str:
    parts = (out,) if isinstance(out, Tensor) else out
    return ' + '.join('x'.join(map(str, part.shape[1:])) for part in parts)


def _identifier(name: str) -> str:
    return name.replace('.', '_').replace(' ', '_')


def _mermaid(kind: str, lines: list[str]) -> str:
    return '\n'.join(['```mermaid', kind, *lines, '```', ''])
