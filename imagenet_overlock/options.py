"""Command-line options from the settings of a recipe."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_type_hints

from imagenet_overlock.recipe import Recipe, base_type


def add_recipe_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds an option for every setting of a recipe, or for those named; one that is not given leaves no attribute."""
    hints = get_type_hints(Recipe)
    group = parser.add_argument_group('settings', "over those of the recipe; --name for the recipe's `name`")
    for item in fields(Recipe):
        if names and item.name not in names:
            continue
        kind = base_type(hints[item.name])
        shown = '' if item.default in (None, '') or kind is bool else f' (default: {_text(item.default)})'
        how: dict[str, Any] = dict(dest=item.name, default=argparse.SUPPRESS, help=item.metadata['help'] + shown)
        if kind is bool:
            how['action'] = argparse.BooleanOptionalAction
        elif kind is tuple:
            how.update(type=float, nargs=2, metavar=('LOW', 'HIGH'))
        else:
            how.update(type=kind, metavar={int: 'N', float: 'X', str: 'NAME'}[kind])
        group.add_argument(*item.metadata['flags'], f'--{item.name.replace("_", "-")}', **how)


def recipe_options(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, by name; they are taken out of `args`."""
    names = [item.name for item in fields(Recipe) if hasattr(args, item.name)]
    return {name: vars(args).pop(name) for name in names}


def _text(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, tuple) else str(value)
