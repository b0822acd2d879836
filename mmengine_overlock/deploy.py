"""Fold trained detectors and segmenters, write their configurations, and check that they predict the same."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from PIL import Image, ImageDraw
from torch import Tensor

from mmengine_overlock.config import load_config, nodes
from overlock.checkpoint import find_file, load
from overlock.checkpoint.convert import convert_file, largest_deviation
from overlock.checkpoint.fitting import compare_weights
from overlock.models.overlock import Trunk
from overlock.utils.errors import UserError
from overlock.utils.files import drafted

# Of the maps of the backbone, relative to the largest value: float32's rounding over some 50 layers.
_MAPS = 1e-4
# Boxes of the same object: pixels and score that float32's rounding may move them by, behind the heads.
_PIXELS, _SCORE = 0.5, 1e-3
# Rounding may tip a box that is as good as another, or a pixel between two classes, but few of them.
_SHARE = 0.98


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for one image.

    Attributes:
        maps: Of its backbone, each (1, C, H, W).
        sample: mmdet's or mmseg's data sample.
    """

    maps: tuple[Tensor, ...]
    sample: Any


def reparameterize(
    config: str | Path,
    checkpoint: str,
    out: str | Path,
    *,
    image: str | Path | None = None,
    ema: bool = False,
    cfg_options: dict[str, Any] | None = None,
) -> str:
    """Fold the backbone of a trained detector or segmenter, and write it with its new configuration.

    Both files are read back and compared with the model before, on one image, on the CPU; they take their names only if
    the predictions are the same but for rounding.

    Args:
        config: File of the configuration that the model was trained with.
        checkpoint: Its weights: path, URL or published name.
        out: The new weights, .pth; the configuration is written beside them, as .py.
        image: The image to compare on; by default a drawn one.
        ema: Whether to take the running average of the weights.
        cfg_options: Settings by dotted name, over those of the configuration; the new one keeps them.

    Returns:
        What was written, and how much the predictions differ.

    Raises:
        UserError, CheckpointError: What the user gave cannot be used; one sentence says why.
        UserError: The predictions are not the same.
    """
    out = Path(out).expanduser()
    cfg = load_config(config, cfg_options)
    source = _check_paths(Path(config), checkpoint, out, image)
    if 'backbone' not in cfg.get('model', {}) or 'test_dataloader' not in cfg:
        raise UserError(
            f'{config} must be the configuration of a detector or segmenter: expected `model.backbone` and '
            '`test_dataloader`; give the one that the checkpoint was trained with'
        )
    with drafted(out, out.with_suffix('.py')) as (weights, configuration):
        picture = Path(image) if image else _draw(weights.parent / 'scene.png')
        before = predict(_build(cfg, load(source, ema), checkpoint), cfg, picture)
        verified = convert_file(source, weights, form='folded', ema=ema).verified
        deployed_config(cfg).dump(configuration)
        new = load_config(configuration)
        after = predict(_build(new, load(weights), out.name), new, picture)
        same, account = compare(after, before)
        if not same:
            found = '; '.join(f'{what} {value}' for what, value in account.items())
            raise UserError(
                f'{out} was not written: on {picture.name} the deploy form predicts something else '
                f'({found}), expected the same but for rounding; check that the weights are finite, or '
                'compare on another image with --image FILE'
            )
    width = max(map(len, account))
    return '\n'.join(
        (
            f'wrote {out} and {out.with_suffix(".py")}',
            f'verified: {verified}',
            f'before and after, on {picture.name}:',
            *(f'{what:<{width}}  {value}' for what, value in account.items()),
        )
    )


def _check_paths(config: Path, checkpoint: str, out: Path, image: str | Path | None) -> Path:
    """Return the local file of the checkpoint; check that the image can be read and that no input is overwritten."""
    if out.suffix != '.pth' or out.is_dir() or out.with_suffix('.py').is_dir():
        raise UserError(f'the output must be a file that ends in .pth, got {out}')
    if image is not None:
        try:
            Image.open(image).close()
        except OSError as error:
            raise UserError(
                f'the image {image} given by --image cannot be read ({error}); give the path of an image file'
            ) from error
    source = find_file(checkpoint)
    for old, new in ((config, out.with_suffix('.py')), (source, out)):
        if new.exists() and new.samefile(old):
            raise UserError(
                f'{new} would be overwritten by the new file of this name; give another name than {out}, '
                'so that nothing is lost'
            )
    return source


def deployed_config(cfg: Config) -> Config:
    """Copy a configuration with the backbone in the folded form and without pretrained weights."""
    cfg = deepcopy(cfg)
    cfg.model.backbone.deploy = True
    cfg.model.backbone.pop('init_cfg', None)
    # What `load_config` settles for one run of one configuration.
    for name in ('work_dir', 'launcher'):
        cfg.pop(name, None)
    return cfg


def _build(cfg: Config, tensors: Mapping[str, Tensor], source: str) -> BaseModel:
    """Build the model of a configuration in evaluation, with all of its tensors from a state dict."""
    settings = deepcopy(cfg.model)
    settings.backbone.pop('init_cfg', None)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        model = revert_sync_batchnorm(MODELS.build(settings))
    if not isinstance(model.backbone, Trunk):
        raise UserError(
            f'{cfg.filename} has the backbone {cfg.model.backbone.type}, expected OverLoCK, which alone '
            'can be folded; give the configuration of an OverLoCK detector or segmenter'
        )
    compare_weights(model, tensors, source).require('give the configuration that it was trained with')
    model.load_state_dict(tensors)
    return model.eval()


def _draw(path: Path) -> Path:
    """Draw rectangles on a ground of smooth colors into a file."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for x, y, width, height, *color in rng.integers(
        (0, 0, 24, 24, 0, 0, 0), (200, 200, 96, 96, 256, 256, 256), (6, 7)
    ).tolist():
        pen.rectangle((x, y, x + width, y + height), fill=tuple(color))
    image.save(path)
    return path


@torch.no_grad()
def predict(model: BaseModel, cfg: Config, image: Path) -> Prediction:
    """Predict an image file, read by the test pipeline of the configuration."""
    pipeline = next(node['pipeline'] for node in nodes(cfg.test_dataloader) if 'pipeline' in node)
    # There is no truth to load.
    steps = [step for step in pipeline if 'Annotations' not in str(step['type'])]
    maps = []
    handle = model.backbone.register_forward_hook(lambda module, args, outs: maps.extend(outs))
    try:
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            item = Compose(steps)(dict(img_path=str(image), img_id=0))
            sample = model.test_step(dict(inputs=[item['inputs']], data_samples=[item['data_samples']]))[0]
    finally:
        handle.remove()
    return Prediction(tuple(maps), sample)


def compare(prediction: Prediction, expected: Prediction) -> tuple[bool, dict[str, str]]:
    """Return whether two predictions are equal up to rounding, and how far apart they are."""
    deviation = largest_deviation(prediction.maps, expected.maps)
    share, account = 1.0, dict[str, str]()
    if 'pred_instances' in expected.sample:
        share, account = _compare_instances(prediction.sample.pred_instances, expected.sample.pred_instances)
    if 'pred_sem_seg' in expected.sample:
        share, account = _compare_maps(prediction.sample, expected.sample)
    account['outputs of the backbone'] = f'within {deviation:.1e} of the largest'
    return deviation <= _MAPS and share >= _SHARE, account


def _compare_maps(found: Any, expected: Any) -> tuple[float, dict[str, str]]:
    """Return the share of pixels of the same class, and the numbers behind it."""
    classes = found.pred_sem_seg.data, expected.pred_sem_seg.data
    share = (classes[0] == classes[1]).double().mean().item()
    deviation = largest_deviation([found.seg_logits.data], [expected.seg_logits.data])
    return share, {
        'classes': f'{share:.4%} of {classes[0].numel()} pixels the same',
        'logits': f'within {deviation:.1e} of the largest',
    }


def _compare_instances(found: Any, expected: Any) -> tuple[float, dict[str, str]]:
    """Return the share of boxes that both have, in any order as scores may be equal, and the numbers behind it."""
    counts = len(expected.scores), len(found.scores)
    account = {'boxes': f'{counts[0]} and {counts[1]}'}
    if 0 in counts:
        return float(counts[0] == counts[1]), account
    shift = (found.bboxes[:, None] - expected.bboxes[None]).abs().amax(-1)
    change = (found.scores[:, None] - expected.scores[None]).abs()
    same = (found.labels[:, None] == expected.labels[None]) & (shift <= _PIXELS) & (change <= _SCORE)
    mine = same.any(1).nonzero().flatten()
    theirs = shift.masked_fill(~same, float('inf')).argmin(1)[mine]
    account['boxes'] += f', {len(mine)} the same'
    if len(mine):
        account['corners'] = f'within {shift[mine, theirs].max().item():.1e} pixels'
        account['scores'] = f'within {change[mine, theirs].max().item():.1e}'
    if len(mine) and 'masks' in expected:
        differ = (found.masks[mine] != expected.masks[theirs]).double().mean().item()
        account['masks'] = f'{1 - differ:.4%} of the pixels the same'
    return min(same.any(axis).double().mean().item() for axis in (0, 1)), account
