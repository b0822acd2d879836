"""Read configurations, and apply the options of the tools to them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log

from mmengine_overlock.options import SPLITS, check_options
from overlock.checkpoint import find_file
from overlock.utils.configs import find_config
from overlock.utils.errors import UserError
from overlock.utils.files import check_writable


def load_config(
    path: str | Path, options: dict[str, Any] | None = None, work_dir: str | Path | None = None, launcher: str = 'none'
) -> Config:
    """Read a configuration and set its work folder and launcher.

    Args:
        path: File of the configuration, or the name of one that comes with the package.
        options: Settings by dotted name, over those of the file.
        work_dir: Folder for logs and checkpoints; by default the configuration's own, else `work_dirs/<its name>`.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        UserError: The file does not exist, its `custom_imports` fail, an option fits nowhere, or FSDP is asked for.
    """
    path = find_config(path)
    try:
        cfg = Config.fromfile(path)
    # OpenMMLab's packages assert the versions of each other.
    except (ImportError, AssertionError) as error:
        reason: BaseException = error
        while cause := reason.__cause__ or reason.__context__:
            reason = cause
        raise UserError(
            f'{path} needs a module that cannot be imported ({reason}); install what it needs, see the README.'
        ) from None
    except (SyntaxError, TypeError, KeyError) as error:
        raise UserError(f'{path} cannot be read as a configuration: {error}') from None
    check_options(cfg, options or {})
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError, AssertionError) as error:
        raise UserError(f'--cfg-options do not fit {path}: {error.args[0]}') from None
    wrapper = (cfg.get('model_wrapper_cfg') or {}).get('type')
    if cfg.get('runner_type') == 'FlexibleRunner' or wrapper == 'MMFullyShardedDataParallel':
        raise UserError(
            f'{path} asks for sharded training by {wrapper or cfg.runner_type}, which is not supported; take it out: '
            'models of this size train by DDP, and --amp and model.backbone.with_cp=True save memory.'
        )
    cfg.work_dir = str(work_dir or cfg.get('work_dir') or Path('work_dirs') / path.stem)
    cfg.launcher = launcher
    return cfg


def nodes(value: Any) -> Iterator[dict]:
    """Yield every dictionary inside a part of a configuration, the part included."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for item in value if isinstance(value, (list, tuple)) else ():
        yield from nodes(item)


def as_list(value: Any) -> list:
    """Return a setting that is one item, several or None as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def set_data_root(cfg: Config, data_root: str | Path) -> None:
    """Move every data set and evaluator to another folder of the same layout.

    Every path of the data loaders and evaluators that lies below one of their `data_root`s is changed in place.

    Raises:
        UserError: There is no such folder, or the configuration has no `data_root` to replace.
    """
    if not Path(data_root).is_dir():
        raise UserError(f'The folder {data_root} given by --data-root does not exist.')
    names = [f'{split}_{part}' for split in SPLITS for part in ('dataloader', 'evaluator')]
    parts = {name: cfg[name] for name in names if cfg.get(name)}
    roots = {node['data_root'] for node in nodes(list(parts.values())) if node.get('data_root')}
    if not roots:
        raise UserError(f'--data-root has nothing to replace: no data set of {cfg.filename} has a data_root.')
    if cfg.get('data_root'):
        parts['data_root'] = cfg.data_root
        roots.add(cfg.data_root)
    prefixes = sorted((root.rstrip('/') + '/' for root in roots), key=len, reverse=True)

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value)({key: moved(item) for key, item in value.items()})
        if isinstance(value, (list, tuple)):
            return type(value)(map(moved, value))
        if isinstance(value, str):
            for prefix in prefixes:
                if f'{value}/'.startswith(prefix):
                    return os.path.join(data_root, value[len(prefix) :])
        return value

    for name, part in parts.items():
        cfg[name] = moved(part)


def set_weights(cfg: Config, weights: str) -> None:
    """Initialize the backbone from another file than the configuration's.

    Raises:
        UserError: The model has no backbone.
        CheckpointError: The file does not exist or cannot be downloaded.
    """
    if 'backbone' not in cfg.model:
        raise UserError(f'--weights is for the backbone, and the model {cfg.model.type} has none.')
    find_file(weights)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=weights)


def enable_auto_scale_lr(cfg: Config) -> None:
    """Scale the learning rate by (batch size in use) / (`auto_scale_lr.base_batch_size`).

    Raises:
        UserError: The configuration does not say which batch size its learning rate is for.
    """
    if not cfg.get('auto_scale_lr', {}).get('base_batch_size'):
        raise UserError(
            '--auto-scale-lr needs the total batch size that the learning rate is meant for; add '
            '`auto_scale_lr = dict(base_batch_size=16)` to the configuration, with its own number.'
        )
    cfg.auto_scale_lr.enable = True


def use_tta(cfg: Config) -> None:
    """Test with the views of `tta_pipeline`, merged by `tta_model`.

    Raises:
        UserError: The configuration lacks one of the two.
    """
    for name in ('tta_model', 'tta_pipeline'):
        if name not in cfg:
            raise UserError(f'--tta needs `{name}`, which {cfg.filename} does not have.')
    cfg.model = type(cfg.model)(**cfg.tta_model, module=cfg.model)
    for node in nodes(cfg.test_dataloader):
        if 'pipeline' in node:
            node['pipeline'] = cfg.tta_pipeline
    for evaluator in as_list(cfg.test_evaluator):
        if cfg.tta_model.type == 'DetTTAModel' and 'segm' in as_list(evaluator.get('metric')):
            print_log(
                'mmdet merges the boxes of several views, but not their masks: only boxes are tested.',
                'current',
                logging.WARNING,
            )
            evaluator['metric'] = 'bbox'
            cfg.custom_hooks = [*as_list(cfg.get('custom_hooks')), dict(type='BoxesOnlyHook')]


def save_predictions(cfg: Config, path: str | Path) -> None:
    """Write the predictions of the test into a pickle file.

    Raises:
        UserError: The name does not end in .pkl or .pickle, or the file cannot be written.
    """
    if Path(path).suffix not in ('.pkl', '.pickle'):
        raise UserError(f'--out takes a file name that ends in .pkl or .pickle, got {path}.')
    check_writable(path)
    kind = 'DumpDetResults' if cfg.get('default_scope') == 'mmdet' else 'DumpSegResults'
    cfg.test_evaluator = [*as_list(cfg.test_evaluator), dict(type=kind, out_file_path=str(path))]


def draw_predictions(cfg: Config, folder: str | Path | None, show: bool = False) -> None:
    """Draw the predictions of every test image beside the ground truth, into a folder, a window or both.

    Raises:
        UserError: The configuration has no visualization hook.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UserError(
            f'--show-dir and --show need the hook `visualization` in default_hooks, which {cfg.filename} does not have.'
        )
    hook.update(draw=True, show=show, interval=1, wait_time=2 if show else 0)
    if folder is None:
        return
    # mmdet puts a relative folder below the work folder, mmseg does not.
    folder = str(Path(folder).absolute())
    if hook['type'] == 'DetVisualizationHook':
        hook['test_out_dir'] = folder
    else:
        cfg.visualizer.save_dir = folder
