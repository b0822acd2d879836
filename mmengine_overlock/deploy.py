"""Fold trained detectors and segmenters, write their configurations, and check that they predict the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from PIL import Image
from torch import Tensor

from mmengine_overlock.config import load_config
from mmengine_overlock.predict import build_model, test_pipeline
from overlock.checkpoint import find_file, load
from overlock.checkpoint.convert import largest_deviation, read_classes, write_weights
from overlock.checkpoint.fitting import compare_weights
from overlock.models.network import Network
from overlock.utils.errors import UserError
from overlock.utils.files import drafted

# Of the maps of the backbone, relative to the largest value: float32's rounding over some 50 layers.
_MAPS = 1e-4
# Boxes of the same object: pixels and score that float32's rounding may move them by, behind the heads.
_PIXELS, _SCORE = 0.5, 1e-3
# Rounding may tip a box that is as good as another, or a pixel between two classes, but few of them.
_SHARE = 0.98


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
    cfg, source = load_config(config, cfg_options), find_file(checkpoint)
    _check_output(out, Path(config), source)
    if 'backbone' not in cfg.get('model', {}) or 'test_dataloader' not in cfg:
        raise UserError(
            f'{config} must be the configuration of a detector or segmenter: expected `model.backbone` and '
            '`test_dataloader`; give the one that the checkpoint was trained with'
        )
    with drafted(out, out.with_suffix('.py')) as (weights, configuration):
        picture = Path(image) if image else _draw(weights.parent / 'scene.png')
        model = build(cfg, load(source, ema), checkpoint)
        before = predict(model, cfg, picture)
        # Not by the file alone, which does not tell the eps of its norms.
        model.backbone.switch_to_deploy()
        write_weights(weights, dict(model.state_dict()), read_classes(source))
        deployed_config(cfg).dump(configuration)
        new = load_config(configuration)
        same, account = compare(predict(build(new, load(weights), out.name), new, picture), before)
        if not same:
            raise UserError(
                f'{out} was not written: on {picture.name} the deploy form predicts something else ({account}), '
                'expected the same but for rounding; check that the weights are finite, or compare on another image '
                'with --image FILE'
            )
    return f'wrote {out} and {out.with_suffix(".py")}\non {picture.name}: {account}'


def _check_output(out: Path, config: Path, checkpoint: Path) -> None:
    """Check the name of the new weights, and that neither new file replaces a given one."""
    if out.suffix != '.pth' or out.is_dir() or out.with_suffix('.py').is_dir():
        raise UserError(f'the output must be a file that ends in .pth, got {out}')
    for old, new in ((config, out.with_suffix('.py')), (checkpoint, out)):
        if new.exists() and new.samefile(old):
            raise UserError(f'{new} would be overwritten by the new file of this name; give another name than {out}')


def deployed_config(cfg: Config) -> Config:
    """Copy a configuration with the backbone in the folded form and without pretrained weights."""
    cfg = deepcopy(cfg)
    cfg.model.backbone.deploy = True
    cfg.model.backbone.pop('init_cfg', None)
    # What `load_config` settles for one run of one configuration.
    for name in ('work_dir', 'launcher'):
        cfg.pop(name, None)
    return cfg


def build(cfg: Config, tensors: Mapping[str, Tensor] | None, source: str = '') -> BaseModel:
    """Build the model of a configuration in evaluation, with all of its tensors from a state dict or random ones.

    Raises:
        UserError: The backbone is none of ours.
        CheckpointError: The state dict, called `source`, is not of this model.
    """
    model = build_model(cfg)
    if not isinstance(model.backbone, Network):
        raise UserError(
            f'{cfg.filename} has the backbone {cfg.model.backbone.type}, expected OverLoCK or MogaNet, '
            'which alone can be folded; give the configuration of a detector or segmenter with one of them'
        )
    if tensors is None:
        model.init_weights()
        return model
    compare_weights(model, tensors, source).require('give the configuration that it was trained with')
    model.load_state_dict(tensors)
    return model


def _draw(path: Path) -> Path:
    """Draw smooth blots of color into a file."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(path)
    return path


@torch.no_grad()
def predict(model: BaseModel, cfg: Config, image: Path) -> tuple[Sequence[Tensor], Any]:
    """Predict an image file, read by the test pipeline of the configuration.

    Returns:
        The maps of the backbone, each (1, C, H, W), and mmdet's or mmseg's data sample.

    Raises:
        UserError: The image cannot be read.
    """
    try:
        Image.open(image).close()
    except OSError as error:
        raise UserError(f'the image {image} cannot be read ({error}); give the path of an image file') from None
    maps: list[Tensor] = []
    handle = model.backbone.register_forward_hook(lambda module, args, outs: maps.extend(outs))
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        item = Compose(test_pipeline(cfg))(dict(img_path=str(image), img_id=0))
        sample = model.test_step(dict(inputs=[item['inputs']], data_samples=[item['data_samples']]))[0]
    handle.remove()
    return maps, sample


def compare(prediction: tuple[Sequence[Tensor], Any], expected: tuple[Sequence[Tensor], Any]) -> tuple[bool, str]:
    """Return whether two predictions are equal up to rounding, and the numbers behind it."""
    deviation = largest_deviation(prediction[0], expected[0])
    same, account = deviation <= _MAPS, f'outputs of the backbone within {deviation:.1e} of the largest'
    found, truth = prediction[1], expected[1]
    if 'pred_sem_seg' in truth:
        share = (found.pred_sem_seg.data == truth.pred_sem_seg.data).double().mean().item()
        same = same and share >= _SHARE
        account += f', {share:.4%} of {truth.pred_sem_seg.data.numel()} pixels of the same class'
    if 'pred_instances' in truth:
        found, truth = found.pred_instances, truth.pred_instances
        # In any order, as scores may be equal.
        pairs = (found.labels[:, None] == truth.labels) & ((found.scores[:, None] - truth.scores).abs() <= _SCORE)
        pairs &= (found.bboxes[:, None] - truth.bboxes).abs().amax(-1) <= _PIXELS
        both = min(int(pairs.any(axis).sum()) for axis in (0, 1))
        same = same and both >= _SHARE * max(pairs.shape)
        account += f', {both} of {len(truth)} and {len(found)} boxes the same'
    return same, account
