"""The settings of a training run: one dataclass, whose defaults are the published settings of all variants."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from overlock.utils.errors import UserError

if TYPE_CHECKING:
    import torch

# By the annotation of a setting: its type, how many of it (0 for one that is no list), and how to call that.
_KINDS: dict[str, tuple[type, int, str]] = {
    'int': (int, 0, 'a whole number'),
    'float': (float, 0, 'a number'),
    'float | None': (float, 0, 'a number'),
    'bool': (bool, 0, 'true or false'),
    'str': (str, 0, 'text'),
    'tuple[float, float]': (float, 2, 'two numbers'),
    'tuple[int, int, int, int] | None': (int, 4, 'four whole numbers'),
}

_CHOICES = {
    'train_interpolation': ('random', 'bilinear', 'bicubic'),
    'amp_dtype': ('float16', 'bfloat16'),
    'on_nan': ('stop', 'skip'),
}


def _setting(default: Any, help: str, low: float = -inf, high: float = inf, flags: tuple[str, ...] = ()) -> Any:
    """Return a field with what the command line and the checks need to know of it."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, flags=flags))


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run, named as in timm's training script where it has them.

    The defaults are the authors' settings. Their total batch of 2048 and learning rate of 2e-3 are met by 8 processes
    of 256 images: the learning rate follows the total batch. As in timm's script, 1-D parameters and biases do not
    decay.

    Raises:
        UserError: If a setting is of the wrong type or out of range.
    """

    model: str = _setting('overlock_xt', 'overlock_{xt,t,s,b} or moganet_{xt,t,s,b,l,xl}')
    drop_path: float = _setting(0.0, 'drop path rate of the last block, linear from 0', 0, 0.99)
    aux_weight: float = _setting(0.4, "weight of the auxiliary head's loss; 0 builds no such head", 0)
    pretrained: bool = _setting(False, 'start from the published weights')
    initial_checkpoint: str = _setting(
        '', 'start from the weights of a file or URL, the averaged ones of a checkpoint of training'
    )

    img_size: int = _setting(224, 'side of the images in pixels', 32)
    crop_pct: float | None = _setting(
        None,
        "side of validation's center crop over that of the resized image "
        '(default: that of the variant, 1.0 above its image size)',
        0.1,
        1,
    )
    batch_size: int = _setting(256, 'images of a step in each process', 1, flags=('-b',))
    grad_accum_steps: int = _setting(1, 'steps whose gradients make one update', 1)
    workers: int = _setting(8, 'processes that read images, for each training process', 0, flags=('-j',))

    epochs: int = _setting(300, 'epochs of warm-up and cosine', 1)
    cooldown_epochs: int = _setting(10, 'epochs at the last learning rate, after the others', 0)
    sched_on_updates: bool = _setting(
        False, 'step the learning rate after each update, not each epoch: short runs need the smoother curve'
    )
    opt: str = _setting('adamw', "one of timm's optimizers")
    lr: float | None = _setting(None, 'learning rate (default: from --lr-base)', 0)
    lr_base: float = _setting(1e-3, 'learning rate for --lr-base-size images in an update, scaled linearly', 0)
    lr_base_size: int = _setting(1024, 'images in an update that --lr-base is for', 1)
    weight_decay: float = _setting(0.05, 'weight decay; none on 1-D parameters and biases', 0)
    layer_decay: float | None = _setting(
        None, 'factor from the learning rate of a layer to that of the one before', 0.01, 1
    )
    warmup_epochs: float = _setting(5.0, 'epochs of linear warm-up, among the epochs', 0)
    warmup_lr: float = _setting(1e-6, 'learning rate that the warm-up starts from', 0)
    min_lr: float = _setting(1e-5, 'learning rate that the cosine ends at', 0)
    clip_grad: float = _setting(5.0, 'largest norm of the gradient; 0 is off', 0)

    scale: tuple[float, float] = _setting((0.08, 1.0), 'area of the random crop over that of the image', 0.001, 1)
    hflip: float = _setting(0.5, 'probability of a horizontal flip', 0, 1)
    color_jitter: float = _setting(0.4, 'color jitter, where --aa is empty or 3a', 0)
    aa: str = _setting('rand-m9-mstd0.5-inc1', 'automatic augmentation, by the name that timm gives it')
    train_interpolation: str = _setting('random', 'resizing of training images: random (of the two), bilinear, bicubic')
    reprob: float = _setting(0.25, 'probability of random erasing', 0, 1)
    mixup: float = _setting(0.8, "alpha of mixup's beta distribution; 0 is off", 0)
    cutmix: float = _setting(1.0, "alpha of cutmix's beta distribution; 0 is off", 0)
    smoothing: float = _setting(0.1, 'label smoothing', 0, 0.99)

    model_ema: bool = _setting(True, 'average the weights over the updates')
    model_ema_decay: float = _setting(0.9999, 'decay of that average in an update', 0, 1)
    sync_bn: bool = _setting(
        True, 'compute BatchNorm over all processes; without it each has its own statistics, averaged after an epoch'
    )
    amp: bool = _setting(True, 'train and validate in autocast; CPUs are faster without')
    amp_dtype: str = _setting(
        'float16', 'dtype of autocast: float16, with gradient scaling, or bfloat16, whose range needs none'
    )
    on_nan: str = _setting('stop', 'stop, or skip the update, where the loss or a gradient is not finite')
    grad_checkpointing: bool = _setting(False, 'recompute activations in the backward pass to save memory')
    ckpt_stg: tuple[int, int, int, int] | None = _setting(
        None, 'with --grad-checkpointing: how many of the first blocks at strides 4, 8, 16 and 32 (default: all)', 0
    )
    seed: int = _setting(42, 'seed of everything random', 0, 2**32 - 1)
    log_interval: int = _setting(50, 'updates between two log lines', 1)

    def __post_init__(self) -> None:
        for item in fields(self):
            # The only way to set a field of a frozen dataclass.
            object.__setattr__(self, item.name, _checked(item, getattr(self, item.name)))
        if self.scale[0] > self.scale[1]:
            raise UserError(f'The setting scale takes the smaller number first, got {list(self.scale)}.')
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f'The setting {name} must be {" or ".join(known)}, got {getattr(self, name)}.')
        if self.ckpt_stg and not self.grad_checkpointing:
            raise UserError('ckpt_stg has no effect without grad_checkpointing; add --grad-checkpointing.')
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f'warmup_epochs must be below epochs, got {self.warmup_epochs} of {self.epochs}; lower warmup_epochs.'
            )
        if self.mixes and self.batch_size % 2:
            raise UserError(
                f'mixup and cutmix mix images in pairs and need an even batch_size, got {self.batch_size}; '
                'take an even one, or set mixup and cutmix to 0.'
            )
        if self.pretrained and self.initial_checkpoint:
            raise UserError(
                'pretrained and initial_checkpoint both say what to start from; leave one of them out, by '
                '--no-pretrained where the recipe has it.'
            )

    @property
    def mixes(self) -> bool:
        """Return whether images are mixed in training."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def autocast(self) -> torch.dtype | None:
        """Return the dtype of autocast, if it is on."""
        # The command line reads this file, and answers without torch.
        import torch

        return getattr(torch, self.amp_dtype) if self.amp else None

    def total_batch(self, processes: int) -> int:
        """Return the number of images in an update over all processes."""
        return self.batch_size * self.grad_accum_steps * processes

    def learning_rate(self, processes: int) -> float:
        """Return the highest learning rate of the schedule with this number of processes."""
        return self.lr_base * self.total_batch(processes) / self.lr_base_size if self.lr is None else self.lr


def load_recipe(path: str | os.PathLike | None = None, options: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file with settings over the defaults of `Recipe`; None for the defaults.
        options: Settings over those of the file.

    Raises:
        UserError: If the file cannot be read, or a setting is unknown, of the wrong type or out of range.
    """
    settings = {} if path is None else _read(Path(path))
    known = [item.name for item in fields(Recipe)]
    for name in settings:
        if name not in known:
            near = get_close_matches(str(name), known, 1)
            raise UserError(
                f'{path} has the setting {name}, which a recipe does not know; '
                + (f'did you mean {near[0]}?' if near else f'it knows {", ".join(known)}.')
            )
    return Recipe(**{**settings, **(options or {})})


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8')) or {}
    except OSError as error:
        raise UserError(
            f'The recipe {path} cannot be read ({error.strerror}); give the path of a .yaml file, such as '
            'those in configs/imagenet/.'
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f'The recipe {path} is not YAML: {" ".join(str(error).split())}.') from None
    if not isinstance(content, dict):
        raise UserError(f'The recipe {path} must hold settings as `name: value`, got a {type(content).__name__}.')
    return content


def _checked(item: Field, value: Any) -> Any:
    """Return the value of a setting in its type.

    Raises:
        UserError: If it is of another type or out of range.
    """
    if value is None and item.default is None:
        return None
    kind, count, wanted = _KINDS[str(item.type)]
    try:
        parts = tuple(_convert(part, kind) for part in (value if count else [value]))
        if len(parts) != max(count, 1):
            raise TypeError
    except (TypeError, ValueError):
        raise UserError(f'The setting {item.name} must be {wanted}, got {value!r}.') from None
    low, high = item.metadata['low'], item.metadata['high']
    if kind in (int, float) and not all(low <= number <= high and number < inf for number in parts):
        bounds = f'at least {low}' if high == inf else f'between {low} and {high}'
        raise UserError(f'The setting {item.name} must be {bounds}, got {value}.')
    return parts if count else parts[0]


def _convert(value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, str):
        # YAML 1.1 takes 1e-3, without a point, for text.
        return float(value)
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return kind(value)


def add_recipe_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add an option for every setting of a recipe, or for those named; one that is not given leaves no attribute."""
    group = parser.add_argument_group('settings', "over those of the recipe; --name for the recipe's `name`")
    for item in fields(Recipe):
        if names and item.name not in names:
            continue
        kind, count, _ = _KINDS[str(item.type)]
        default: Any = item.default
        if kind is bool:
            how: dict[str, Any] = dict(action=argparse.BooleanOptionalAction)
        else:
            how = dict(type=kind, metavar={int: 'N', float: 'X', str: 'NAME'}[kind], nargs=count or None)
        if isinstance(default, tuple):
            default = ' '.join(map(str, default))
        shown = '' if kind is bool or default in (None, '') else f' (default: {default})'
        flags = (*item.metadata['flags'], f'--{item.name.replace("_", "-")}')
        group.add_argument(*flags, dest=item.name, default=argparse.SUPPRESS, help=item.metadata['help'] + shown, **how)


def recipe_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given, by name, and remove them from `args`."""
    names = [item.name for item in fields(Recipe) if hasattr(args, item.name)]
    return {name: vars(args).pop(name) for name in names}
