"""Settings given beside a configuration, by dotted name: refuse those that nothing would read."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import Registry
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, LogProcessor, Runner, TestLoop, ValLoop
from mmengine.runner.utils import set_random_seed
from torch.utils.data import DataLoader

from overlock.utils.errors import UserError

# Of the data: what the names of loaders, loops and evaluators begin with.
SPLITS = ('train', 'val', 'test')
# What builders take out of a part before its class gets the rest.
_BUILDERS = {'type', '_scope_', '_delete_', 'constructor', 'paramwise_cfg', 'priority', 'convert_to_iter_based'}
# What Runner reads from the whole configuration, beside its arguments.
_RUNNER = set(
    'activation_checkpointing compile custom_imports efficient_conv_bn_eval find_unused_parameters model_wrapper_cfg '
    'runner_type sync_bn tta_model tta_pipeline'.split()
)
_Readers = list[Callable | set[str]]
_LOOPS: _Readers = [EpochBasedTrainLoop, IterBasedTrainLoop, ValLoop, TestLoop, {'by_epoch'}]
_LOADER: _Readers = [DataLoader, {'num_batch_per_epoch', 'disable_subprocess_warning'}]
_MULTIPLIERS = ('bias_lr', 'bias_decay', 'norm_decay', 'flat_decay', 'dwconv_decay', 'dcn_offset_lr')
# The readers of parts without a `type`: functions, and names that they read themselves.
_READERS: dict[str, _Readers] = {
    **{f'{split}_dataloader': _LOADER for split in SPLITS},
    **{f'{split}_cfg': _LOOPS for split in SPLITS},
    'optim_wrapper': [OptimWrapper],
    'optim_wrapper.paramwise_cfg': [
        {f'{name}_mult' for name in _MULTIPLIERS}
        | {'bypass_duplicate', 'custom_keys', 'decay_rate', 'decay_type', 'num_layers'}
    ],
    # Of segmenters, whose configurations may lack those of the other mode.
    'model.test_cfg': [{'mode', 'stride', 'crop_size'}],
    'auto_scale_lr': [{'enable', 'base_batch_size'}],
    'randomness': [set_random_seed],
    'env_cfg': [{'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'}],
    'log_processor': [LogProcessor],
    'default_hooks': [{'runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint'}],
}
# Parts whose names are the user's.
_FREE = {
    'custom_keys',
    'metainfo',
    'mp_cfg',
    'dist_cfg',
    'model_wrapper_cfg',
    'backend_args',
    'sampler_cfg',
    'clip_grad',
}


def check_options(cfg: Config, options: dict[str, Any]) -> None:
    """Check that each setting has a place: a key that exists, or an argument that its part takes.

    Args:
        cfg: The configuration without the options.
        options: Settings by dotted name.

    Raises:
        UserError: A setting would be ignored; the sentence names the nearest one.
    """
    for key in options:
        node: Any = cfg._cfg_dict
        parts = key.split('.')
        for depth, part in enumerate(parts):
            if not isinstance(node, dict):
                # mmengine tells of places that a list lacks.
                if not isinstance(node, list) or not part.isdigit() or int(part) >= len(node):
                    break
                node = node[int(part)]
                continue
            path = '.'.join(parts[:depth])
            known = _known(cfg, node, path, options)
            if part in node and (path or part in (known or ())):
                node = node[part]
                continue
            if part in node and not (places := list(_copies(cfg._cfg_dict, part))):
                # A hook of the user may read it.
                break
            if part in node:
                raise UserError(
                    f'--cfg-options {key} would change nothing: {part} of {cfg.filename} is used when the file is read '
                    f'and not after; set {" and ".join(places)}.'
                )
            if known is None or part in known or f'{path}.{part}.type'.lstrip('.') in options:
                break
            close = difflib.get_close_matches(part, {*known, *node}, 1)
            remedy = (
                f'did you mean {".".join([*parts[:depth], *close, *parts[depth + 1 :]])}?'
                if close
                else 'give a key that is there, or write it into the file.'
            )
            raise UserError(
                f'--cfg-options {key} fits nothing in {cfg.filename}: {path or "it"} has no {part}; {remedy}'
            )


def _known(cfg: Config, node: dict, path: str, options: dict[str, Any]) -> set[str] | None:
    """Return the names that a part of the configuration takes beside those that it has, None for any."""
    if not path:
        return {*inspect.signature(Runner).parameters, *_RUNNER}
    if path.rpartition('.')[2] in _FREE:
        return None
    kind = options.get(f'{path}.type', node.get('type'))
    readers = _READERS.get(path, []) if kind is None else _find(kind, cfg.get('default_scope') or 'mmengine')
    names = {*_BUILDERS} if kind or readers else {'_delete_'}
    for reader in readers:
        found = reader if isinstance(reader, set) else _arguments(reader)
        if found is None:
            return None
        names |= found
    return None if kind and not readers else names


def _find(kind: Any, scope: str) -> list[Any]:
    """Return all that is registered by a name."""
    if not isinstance(kind, str):
        return [kind] if callable(kind) else []
    name = kind if '.' in kind else f'{scope}.{kind}'
    registries = [item for item in vars(mmengine.registry).values() if isinstance(item, Registry)]
    return [found for registry in registries if (found := registry.get(name))]


def _arguments(function: Callable) -> set[str] | None:
    """Return the names that a function or class takes, or None for any; `**kwargs` go on to the class above."""
    names: set[str] = set()
    kinds = inspect.getmro(function) if inspect.isclass(function) else (function,)
    for kind in kinds:
        if inspect.isclass(kind) and '__init__' not in vars(kind):
            continue
        call = kind.__init__ if inspect.isclass(kind) else kind
        if kind is object:
            return None
        parameters = inspect.signature(call).parameters.values()
        names |= {parameter.name for parameter in parameters if parameter.kind.name.endswith(('KEYWORD', 'ONLY'))}
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            return names
    return None


def _copies(top: dict, name: str) -> Iterator[str]:
    """Yield the places where the value of a variable of the file was put by its own name, or as a whole part."""
    value = top[name]

    def walk(node: Any, path: str) -> Iterator[str]:
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            place = f'{path}.{key}'.lstrip('.')
            if item == value and (key == name or isinstance(item, (dict, list, tuple))):
                yield place
            elif isinstance(item, (dict, list, tuple)):
                yield from walk(item, place)

    for key in inspect.signature(Runner).parameters:
        if isinstance(top.get(key), (dict, list)):
            yield from walk(top[key], key)
