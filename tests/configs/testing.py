"""The configurations' names, the tables they are checked against, and small models and batches of them."""

import copy
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope, init_default_scope
from mmengine.structures import PixelData
from torch import Tensor

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'

VARIANTS = ('xt', 't', 's', 'b')
# Of the four maps that the backbone gives a neck or head.
CHANNELS = {'xt': [56, 112, 340, 420], 't': [64, 128, 384, 640], 's': [64, 128, 448, 640], 'b': [80, 160, 528, 720]}

DETECTORS = [
    f'{head}_overlock_{arch}_{schedule}'
    for head in ('mask_rcnn', 'cascade')
    for arch in VARIANTS
    for schedule in ('1x', '3x')
]
SEGMENTERS = [f'upernet_overlock_{arch}_160k' for arch in VARIANTS]
ALL = DETECTORS + SEGMENTERS
# One configuration of every head and schedule, and one of every model: the schedules of a head share theirs.
RECIPES = [name for name in ALL if '_xt_' in name]
MODEL_NAMES = [name for name in ALL if not name.endswith('_3x')]


def variant(name: str) -> str:
    return re.search(r'overlock_(xt|t|s|b)_', name).group(1)


@functools.cache
def _parsed(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py')


def load_config(name: str) -> Config:
    """Return one of the shipped configurations by its file name without suffix; the caller may change it."""
    return copy.deepcopy(_parsed(name))


@contextmanager
def default_scope(cfg: Config | None = None) -> Iterator[None]:
    """Use the scope of a configuration, and give back the one before: mmengine holds it for the whole process."""
    before = DefaultScope.get_current_instance()
    if cfg is not None:
        init_default_scope(cfg.default_scope)
    try:
        yield
    finally:
        if before is not None:
            init_default_scope(before.scope_name)


def build_meta(cfg: Config) -> torch.nn.Module:
    """Build the model on the meta device: names, shapes and types without values."""
    with default_scope(cfg), torch.device('meta'):
        return MODELS.build(cfg.model)


def build_small(cfg: Config) -> torch.nn.Module:
    """Build the model with random weights and its layers as they are, cheap to train and test on 64x96 images."""
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 64)
    elif 'rcnn' not in cfg.model.train_cfg:
        cfg.model.test_cfg.update(score_thr=0.0, max_per_img=5)
    else:
        rcnn = cfg.model.train_cfg.rcnn
        for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
            stage.sampler.num = 16
        cfg.model.test_cfg.rpn.max_per_img = 20
        # Random weights score every class near 1/81, below the threshold of trained models.
        cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)
    cfg.model.backbone.pop('init_cfg')
    torch.manual_seed(0)
    with default_scope(cfg):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    return model


def batch(cfg: Config, height: int, width: int, **metainfo) -> dict:
    """Return two images with their truth, as the data loader of the configuration's toolbox gives them."""
    make = _segmentation_batch if cfg.default_scope == 'mmseg' else _detection_batch
    data = make(height, width)
    for sample in data['data_samples']:
        sample.set_metainfo(metainfo)
    return data


def _detection_batch(height: int, width: int) -> dict:
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(
        batch_size=2, image_shapes=(3, height, width), num_items=[2, 1], num_classes=80, with_mask=True
    )


def _segmentation_batch(height: int, width: int) -> dict:
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(ori_shape=(height, width), img_shape=(height, width)))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, height, width), generator=generator))
        samples.append(sample)
    images = [torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8) for _ in range(2)]
    return dict(inputs=images, data_samples=samples)


def learning_rates(cfg, iterations: int, epoch: int) -> Tensor:
    """Return the rate of every iteration, (iterations,), float64, stepping the schedulers as the runner does."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [PARAM_SCHEDULERS.build(item, default_args=dict(optimizer=optimizer)) for item in cfg.param_scheduler]
    optimizer.step()
    rates = []
    for iteration in range(1, iterations + 1):
        rates.append(optimizer.param_groups[0]['lr'])
        for scheduler in schedulers:
            if not scheduler.by_epoch or iteration % epoch == 0:
                scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


def warm_up(iterations: Tensor, length: int, ratio: float) -> Tensor:
    """Return the linear warm-up factor of mmcv 1.7, with which the authors trained."""
    return 1 - (1 - iterations / length).clamp(min=0) * (1 - ratio)
