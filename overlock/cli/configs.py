"""List the configurations with task, parameters and reported result, or copy one with its bases, to edit."""

from __future__ import annotations

import argparse
import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from overlock.utils.configs import CONFIGS, ROOT, config_names, find_config, model_of
from overlock.utils.errors import UserError

_TASKS = {
    'mask_rcnn': 'instance segmentation',
    'cascade': 'instance segmentation',
    'retinanet': 'detection',
    'upernet': 'segmentation',
    'fpn': 'segmentation',
}


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option('name', nargs='?', help='print the path of this configuration')
    option('--copy', metavar='DIR', help='copy it with its bases into this folder')


def run(name: str | None, copy: str | None) -> None:
    if name:
        print(copy_config(name, Path(copy)) if copy else find_config(name))
    elif copy:
        raise UserError('--copy needs the name of a configuration: overlock configs NAME --copy DIR.')
    else:
        print(table())


def table() -> str:
    """Return a line for each configuration: parameters of docs/complexity.json, results of model-index.yml."""
    try:
        import yaml
    except ImportError:
        raise UserError('The list needs the package pyyaml, which mmengine brings; run: pip install pyyaml.') from None

    index = yaml.safe_load((ROOT / 'model-index.yml').read_text(encoding='utf-8'))
    known = {Path(model['Config']).stem: model for model in index['Models'] if 'Config' in model}
    counts = json.loads((ROOT / 'docs/complexity.json').read_text(encoding='utf-8'))
    rows = [('configuration', 'task', 'parameters', 'reported')]
    for name in config_names():
        model = known.get(name, {})
        results = [f'{key} {value}' for result in model.get('Results', []) for key, value in result['Metrics'].items()]
        task = next((task for prefix, task in _TASKS.items() if name.startswith(prefix)), '')
        parameters = f'{counts[model_of(name)]["parameters"] / 1e6:.1f} M'
        rows.append((name, task, parameters, ', '.join(results) or '-'))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join(
        '  '.join(f'{cell:<{width}}' for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def copy_config(name: str, folder: Path) -> Path:
    """Copy a configuration with all that it inherits from, in the folders that they have here.

    Returns:
        The copy.

    Raises:
        UserError: There is no such configuration here, or a file of another content is in the way.
    """
    source = find_config(name).resolve()
    if not source.is_relative_to(CONFIGS):
        raise UserError(f'{name} is a file of your own; --copy takes the names that `overlock configs` lists.')
    copies = {path: folder / path.relative_to(CONFIGS) for path in with_bases(source)}
    taken = [str(copy) for path, copy in copies.items() if copy.exists() and copy.read_bytes() != path.read_bytes()]
    if taken:
        raise UserError(f'{", ".join(taken)} would be overwritten; give another folder, or remove the files there.')
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return copies[source]


def with_bases(path: Path) -> Iterator[Path]:
    """Yield a configuration and all that it inherits from."""
    yield path
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == '_base_':
            value = ast.literal_eval(node.value)
            for base in [value] if isinstance(value, str) else value:
                yield from with_bases((path.parent / base).resolve())
