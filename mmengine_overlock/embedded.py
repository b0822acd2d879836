"""The configuration that a checkpoint carries: read as values, never run."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from mmengine.config import Config

from mmengine_overlock.config import nodes
from overlock.utils.configs import CONFIGS
from overlock.utils.errors import UserError

# What makes a prediction. Everything else in a configuration, the training above all, is left alone.
_PARTS = ('default_scope', 'model', 'test_dataloader')
# Importing these registers the backbones.
_PLUGINS = {'mmdet': 'mmdet_overlock', 'mmseg': 'mmseg_overlock'}


def embedded_config(checkpoint: Mapping[str, Any], source: str) -> Config:
    """Return the configuration that mmengine's runner wrote into a checkpoint, as far as predictions need it.

    mmengine itself runs this text as Python. Here it may hold values alone, and a `type` may only be one that the
    configurations of this package have: some of what OpenMMLab registers evaluates or loads what it is given.

    Args:
        checkpoint: What the file holds.
        source: Its name, for messages.

    Raises:
        UserError: There is no configuration, or it holds more than values and known types.
    """
    meta = checkpoint.get('meta')
    text = meta.get('cfg') if isinstance(meta, Mapping) else None
    remedy = 'give the configuration that it was trained with by --config'
    if not isinstance(text, str):
        raise UserError(f'{source} carries no configuration; {remedy}.')
    try:
        body = ast.parse(text).body
        values = {node.targets[0].id: _value(node.value) for node in body if node.targets[0].id in _PARTS}  # type: ignore[attr-defined]
    except (SyntaxError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f'The configuration in {source} holds more than values ({error}); {remedy}.') from None
    scope = values.get('default_scope')
    if scope not in _PLUGINS or not isinstance(values.get('model'), dict) or 'test_dataloader' not in values:
        raise UserError(
            f'The configuration in {source} is none of a detector or segmenter: expected `model`, `test_dataloader`, '
            f'and default_scope to be one of {", ".join(_PLUGINS)}, got {scope!r}; {remedy}.'
        )
    import_module(_PLUGINS[scope])
    for node in nodes(values):
        # It tells what training started from.
        node.pop('init_cfg', None)
    if strange := strangers(values):
        raise UserError(
            f'The configuration in {source} asks for {strange[0]!r}, which no configuration of this package has; if '
            'you trust it, give it by --config.'
        )
    return Config(values)


def _value(node: ast.expr) -> Any:
    """Return the value of an expression of literals and `dict(name=...)`.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        if any(item.arg is None for item in node.keywords):
            raise ValueError('a ** in a call')
        return {item.arg: _value(item.value) for item in node.keywords}
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError('a ** in a dictionary')
        return {ast.literal_eval(key): _value(item) for key, item in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    return ast.literal_eval(node)


def strangers(part: Any) -> list[Any]:
    """Return the types, and keys that mmengine reads itself, that no configuration of this package has, at any depth.

    A type may be the path of any function; the key `_scope_` imports a package.
    """
    found: list[Any] = []
    for node in nodes(part):
        found += (key for key in node if str(key).startswith('_'))
        kind = node.get('type')
        if 'type' in node and not (isinstance(kind, str) and kind in _known_types()):
            found.append(kind)
    return found


@functools.cache
def _known_types() -> frozenset[str]:
    """Return the types in the configurations of this package, and those that its tools write."""
    # Of `--masks`.
    found = {'BaseSegDataset'}
    for path in CONFIGS.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.keyword) and node.arg == 'type' and isinstance(node.value, ast.Constant):
                found.add(str(node.value.value))
    return frozenset(found)
